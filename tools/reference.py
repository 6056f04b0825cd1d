"""Reference pages that are written from the code when the site is built: all settings, and all commands."""

import dataclasses
import re
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from transformers import TrainingArguments

from bondlm.cli.help import GROUPS, bond_fields, command_help, main_help
from bondlm.cli.options import COMMANDS
from bondlm.config import SETTINGS, BONDConfig
from bondlm.config.settings import Setting
from bondlm.objectives.make import OBJECTIVES, users

CHANGES = {
    "on demand": "with `--allow_config_change`",
    "always": "yes",
    "if endless": "if the learning rate does not depend on the run's length",
    "never": "no",
}
PAGE = re.compile(r"\b(?:docs/)([\w/]+\.md)")
INTRO = """# Settings

Written from the code. All are fields of `BONDConfig`, options of `bondlm train` and `bondlm check` (`--name value`),
and lines of their YAML file. A setting that a run would not use is refused. What to choose:
[objectives](../objectives.md).
"""
INHERITED = """
## From transformers

`BONDConfig` is a `transformers.TrainingArguments`. Fields that are not named on this page are as [transformers
documents](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments) them. Of these
something is known here; what would do nothing is refused:

| field | what is allowed | may change when a run is continued |
|---|---|---|
"""


def pages() -> dict[str, str]:
    """Text of each page, by its name on the site."""
    return {"reference/settings.md": settings_page(), "reference/commands.md": commands_page()}


def settings_page() -> str:
    """Every setting with its type, range, default and user; those of transformers in a table."""
    own = bond_fields()
    parts = [INTRO]
    for group in GROUPS:
        members = [name for name, field in own.items() if field.section == group]
        parts += [f"\n## {group.capitalize()}\n"] if members else []
        parts += [_setting(name, SETTINGS[name]) for name in members]
    inherited = [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in own]
    rows = (_inherited_row(name, SETTINGS[name]) for name in inherited)
    return "".join([*parts, INHERITED, *(row for row in rows if row is not None)])


def commands_page() -> str:
    """What each command's `--help` prints."""
    parts = ["# Commands\n\nWhat `--help` prints. Run folder and exit codes: [files](../cli.md).\n"]
    parts.append(f"\n```text\n{main_help()}\n```\n")
    parts += [f"\n## bondlm {name}\n\n```text\n{command_help(name)}\n```\n" for name in COMMANDS]
    return "".join(parts)


def _setting(name: str, setting: Setting) -> str:
    field = vars(BONDConfig)["__dataclass_fields__"][name]
    rows = {
        "type": _type_name(field.type),
        "default": f"`{field.default!r}`",
        "range": setting.rule.text if setting.rule else _range_of_objective(name),
        "used by": _users(name, setting),
        "may change when a run is continued": CHANGES[setting.may_change],
    }
    head, *rest = [f"| {key} | {value} |\n" for key, value in rows.items() if value]
    return f"\n### {name}\n\n{_linked(bond_fields()[name].text)}\n\n{head}|---|---|\n{''.join(rest)}"


def _range_of_objective(name: str) -> str:
    return "each objective has its own: it says so when it refuses a value" if users(name) else ""


def _users(name: str, setting: Setting) -> str:
    objectives = users(name)
    words = []
    if objectives and len(objectives) < len(OBJECTIVES):
        words.append("`objective`: " + ", ".join(f"`{each}`" for each in objectives))
    if setting.needs is not None:
        words.append("`{}: {}`".format(*setting.needs))
    return "; with ".join(words) or "any objective"


def _type_name(kind: Any) -> str:
    """A type as Python writes it; of the choices of a Literal, and of a wrapper, what they are made of."""
    names = [_plain_name(each) for each in (get_args(kind) if isinstance(kind, UnionType) else (kind,))]
    return "`" + " | ".join(dict.fromkeys(names)) + "`"


def _plain_name(kind: Any) -> str:
    if kind is NoneType:
        return "None"
    if get_origin(kind) is not None and not isinstance(get_origin(kind), type):  # Literal
        return type(get_args(kind)[0]).__name__
    inner = getattr(kind, "type", None)  # InitVar
    return _plain_name(inner) if isinstance(inner, type) else getattr(kind, "__name__", str(kind))


def _inherited_row(name: str, setting: Setting) -> str | None:
    if setting.rule is None and setting.may_change == "on demand":
        return None
    allowed = setting.rule.text if setting.rule else "as in transformers"
    return f"| `{name}` | {_linked(allowed)} | {CHANGES[setting.may_change]} |\n"


def _linked(text: str) -> str:
    """The pages that a text names as links."""
    return PAGE.sub(r"[\1](../\1)", text.replace("|", "\\|"))
