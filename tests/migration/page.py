"""The table of names in docs/trl.md: `PYTHONPATH=tests python -m migration.page --write`."""

import argparse
from pathlib import Path

from bondlm.migration import ARGUMENTS, COMMAND_LINE, SETTINGS, STAGES, Foreign

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
BEGIN, END = "<!-- names -->\n", "<!-- end of names -->"
OF_STAGES = {name: foreign for name, foreign in STAGES.items() if SETTINGS.get(name) is not foreign}
PARTS = (
    ("Settings", SETTINGS),
    ("Options of scripts", COMMAND_LINE),
    ("Options of `sft` and `reward-model`", OF_STAGES),
    ("Arguments of the trainer", ARGUMENTS),
)


def row(name: str, foreign: Foreign) -> str:
    accepted = ", ".join(f"`{value!r}`" for value in foreign.neutral)
    return f"| `{name}` | {foreign.text} | {accepted} |"


def tables() -> str:
    """All names, each with its sentence."""
    parts = []
    for title, names in PARTS:
        head = [f"### {title}", "", "| TRL | bondlm | Accepted |", "|---|---|---|"]
        parts.append("\n".join([*head, *(row(name, foreign) for name, foreign in names.items()), ""]))
    return "\n".join(parts)


def written() -> str:
    """The tables as the page has them."""
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(BEGIN + written(), BEGIN + tables()), encoding="utf-8")
