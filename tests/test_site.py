"""What the site of the documentation is made of: the menu has every page, the reference every setting and command."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from bondlm.cli.options import COMMANDS
from bondlm.config import SETTINGS, BONDConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import reference  # noqa: E402

PAGE = reference.settings_page()


def section(name: str) -> str:
    return PAGE[PAGE.index(f"### {name}\n") :].split("\n##")[0]


def pages_of(menu: Any) -> set[str]:
    if isinstance(menu, str):
        return {menu}
    return {page for each in (menu.values() if isinstance(menu, dict) else menu) for page in pages_of(each)}


def test_the_menu_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = pages_of(yaml.safe_load(text)["nav"])
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    generated = {"index.md", *reference.pages()}
    assert {page for page in listed if not page.startswith("source/")} == written | generated
    for page in listed - written - generated:
        assert (ROOT / page.removeprefix("source/")).is_file(), page


def test_nothing_of_the_site_comes_from_elsewhere() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript"} & set(config)


def test_the_reference_has_every_setting_with_type_default_range_and_user() -> None:
    base = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = {f.name for f in dataclasses.fields(BONDConfig) if f.name not in base or f.default != base[f.name]}
    names = re.findall(r"^### (\w+)$", PAGE, re.M)
    assert ours <= set(names)
    assert len(names) == len(set(names))
    for name in names:
        assert "| type | `" in section(name), name
        assert f"| default | `{vars(BONDConfig)['__dataclass_fields__'][name].default!r}` |" in section(name)
        rule = SETTINGS[name].rule
        assert rule is None or rule.text in section(name)
    assert "| used by | `objective`: `bond`; with `quantile: monte_carlo` |" in section("correction")
    assert "`anchor: ema`" in section("eta")
    assert "must lie in [0, 1]" in section("eta")


def test_inherited_settings_that_are_refused_are_in_the_table() -> None:
    table = PAGE[PAGE.index("## From transformers") :]
    for name in {field.name for field in dataclasses.fields(TrainingArguments)}:
        if SETTINGS[name].rule is not None and f"### {name}\n" not in PAGE:
            assert f"| `{name}` |" in table, name


def test_every_command_has_its_help_on_a_page() -> None:
    page = reference.commands_page()
    assert re.findall(r"^## bondlm ([\w-]+)$", page, re.M) == list(COMMANDS)
    assert page.count("usage: bondlm") == len(COMMANDS) + 1
