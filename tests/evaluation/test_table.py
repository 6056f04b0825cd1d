"""What a person reads on the terminal: the tables of an evaluation, and the lines of work that goes on."""

import io
import math

import pytest
from rich.console import Console

from bondlm.cli import console as shown
from bondlm.cli.console import Counter, clock_text, elapsed_and_eta, make_progress
from bondlm.evaluation.statistics import summarize
from bondlm.evaluation.table import print_evaluation, print_table
from evaluation.test_statistics import case, scored


def piped():
    return Console(file=io.StringIO(), width=120)


def test_an_evaluation_during_training_is_a_table_without_inf():
    ends = {"": math.inf, "_low": math.inf, "_high": math.inf}
    metrics = {f"eval_effective_n{end}": value for end, value in ends.items()}
    for name in ("win_rate", "reward", "reference_reward", "kl"):
        metrics |= {f"eval_{name}": 0.75, f"eval_{name}_low": 0.5, f"eval_{name}_high": 1.0}
    console = piped()
    print_evaluation(console, 7, metrics, 16)
    text = console.file.getvalue()
    assert "step 7" in text
    assert "> 16" in text
    assert "inf" not in text
    assert "0.750 ±0.250" in text


def test_the_final_tables_show_order_verbosity_both_kls_and_the_cost():
    policy, reference, others = case()
    others["policy, greedy"] = scored(policy.rewards_PM[:, :1])
    console = piped()
    print_table(console, summarize(policy, reference, others, opponent=scored(policy.rewards_PM)))
    text = console.file.getvalue()
    for word in (
        "log-quantile",
        "correlation of reward and length",
        "forward",
        "backward",
        "k3 a token",
        "One answer: 10",
    ):
        assert word in text
    assert "Win rate against the opponent: 0.5" in text
    assert "nan" not in text
    assert max(len(line) for line in text.splitlines()) <= 120


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
