"""docs/trl.md answers the names that the code answers, and its scripts' settings are bondlm's."""

import re
from pathlib import Path

import pytest

from bondlm import BONDConfig
from migration.page import PAGE, tables, written

CALL = re.compile(r"args = BONDConfig\((.*)\)")


def test_the_page_has_every_name() -> None:
    assert written() == tables()


@pytest.mark.parametrize("arguments", CALL.findall(PAGE.read_text(encoding="utf-8")))
def test_the_scripts_of_the_page_make_a_config(arguments: str, tmp_path: Path) -> None:
    made = eval(f"dict({arguments})")
    config = BONDConfig(**made | {"output_dir": str(tmp_path), "use_cpu": True})
    assert {name: getattr(config, name) for name in made if name != "output_dir"} == {
        name: value for name, value in made.items() if name != "output_dir"
    }


def test_the_defaults_of_the_page_are_bondlms(tmp_path: Path) -> None:
    config = BONDConfig(output_dir=str(tmp_path), use_cpu=True)
    text = PAGE.read_text(encoding="utf-8")
    assert f"| `max_completion_length` | 512 | {config.max_completion_length} |" in text
    assert f"constant after {config.warmup_steps} steps of warm-up" in text
    assert f"`beta_rl`: {config.beta_rl};" in text
