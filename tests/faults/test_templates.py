"""Row T6 of the fault matrix: chat templates that are wrong or hostile; more of them is in tests/data."""

import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cli.helpers import write_job
from data.helpers import encode, user
from jinja2.filters import do_int
from tiny import tiny_tokenizer
from trainer.helpers import TOKENIZER

from bondlm.cli import main
from bondlm.data import chat_templates as templates
from bondlm.errors import BondError, ConfigError

TEMPLATES = {
    "none": (None, "chat template", 2),
    "not Jinja": ("{% for %}", "Jinja", 2),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "row 0: SecurityError", 3),
    "imports": ("{{ cycler.__init__.__globals__.os.system('touch marker') }}", "row 0: SecurityError", 3),
    "a long loop": ("{% for i in range(999999999) %}{{ i }}{% endfor %}", "row 0: OverflowError", 3),
    "raises": ("{{ raise_exception('no system role') }}", "row 0: TemplateError: no system role", 3),
    "a missing key": ("{{ messages[9].content }}", "row 0: UndefinedError", 3),
    "writes nothing": ("", "row 0: no tokens", 3),
}


@pytest.mark.parametrize(("template", "message", "code"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_t6_bad_and_hostile_templates(
    template: str | None, message: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template  # type: ignore[assignment]
    with pytest.raises(BondError, match=message) as caught:
        encode([user("hello")], tokenizer)
    assert caught.value.exit_code == code
    assert list(tmp_path.iterdir()) == []


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
BOMBS = {
    "a loop that writes nothing": (LOOP.replace("BODY", ""), r"0\.3 s .*row 0"),
    "generators in filters": (
        LOOP.replace("BODY", "{{ range(9999)|map('string')|join|length }}"),
        r"0\.3 s ",
    ),
    "much text": (
        "{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}",
        r"\b2000000 characters.*\b5\b",
    ),
    "a text beyond memory": ("{{ 'x' * 10 ** 17 }}", "memory"),
}


@pytest.mark.parametrize(("template", "message"), BOMBS.values(), ids=BOMBS.keys())
@pytest.mark.parametrize("in_thread", [False, True])
def test_t6_a_template_that_does_not_end_is_stopped(
    template: str, message: str, in_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (templates.MAX_ADDED, templates.MAX_SECONDS) == (2**20, 5.0)
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    trace = sys.gettrace()

    def bomb() -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            encode([user("hello")], tokenizer)
        assert caught.value.exit_code == 2

    if in_thread:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(bomb).result()
    else:
        bomb()
    assert sys.gettrace() is trace


def test_t6_a_filter_does_not_swallow_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is up inside a `try` of Jinja's own, which catches what numbers raise."""
    lines, first = inspect.getsourcelines(do_int)
    place = first + next(i for i, line in enumerate(lines) if "return int(value, base)" in line)

    def clock() -> float:
        frame = sys._getframe(1).f_locals.get("frame")
        return float("inf") if frame and frame.f_code is do_int.__code__ and frame.f_lineno == place else 0.0

    monkeypatch.setattr(templates, "LINES_A_LOOK", 1)
    monkeypatch.setattr(templates.time, "thread_time", clock)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ '12'|int }}"
    with pytest.raises(ConfigError, match=r"\b5 s "):
        encode([user("hello")], tokenizer)


def test_t6_ends_the_command_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_job(tmp_path)
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}")
    assert main(["train", "--config", str(config)]) == 2
    assert "2000000 characters" in capsys.readouterr().err


def test_t6_long_messages_are_not_the_templates_fault() -> None:
    """1.2 MB of them pass, and are as long as they were."""
    (ids,) = encode([user("word " * 240_000)], TOKENIZER)
    assert TOKENIZER.decode(ids).count("word ") == 240_000
