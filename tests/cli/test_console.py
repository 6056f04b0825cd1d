"""Lines of work that goes on."""

import pytest
from evaluation.test_table import piped

from bondlm.cli import console as shown
from bondlm.cli.console import Counter, clock_text, elapsed_and_eta, make_progress


def test_progress_says_how_long_it_took_and_will_take(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    console = piped()
    count = Counter(make_progress(console), "samples", 20)
    count(4)  # on file
    for _ in range(15):
        now[0] += 1.0
        count(1)
    now[0] += 1.0
    count(1)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 8  # one in two seconds, and the last
    assert lines[0] == "samples: 6/20 prompts, elapsed 0:02, ETA 0:14"
    assert lines[-1] == "samples: 20/20 prompts, 16 s"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3723, "1:02:03")])
def test_durations(seconds, text):
    assert clock_text(seconds) == text
    assert elapsed_and_eta(seconds, 0, 10).endswith("ETA ?")
