"""Each error that a user can meet has its page: by class, and by the setting that the message names."""

import ast
import re
from pathlib import Path

import pytest

from bondlm import errors
from bondlm.cli.options import COMMANDS
from bondlm.config import SETTINGS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
OPTIONS = {name for _, names in COMMANDS.values() for name in names} | set(SETTINGS)
CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BondError)]


def rows(title: str) -> list[list[str]]:
    part = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")][1:]


def names_in_errors() -> set[str]:
    """Settings that a message names as `name=`, `name: must` or `name is required`."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_made = isinstance(node, ast.Call) and re.search(r"(Error|Rule|_unless)$", ast.unparse(node.func))
            if is_made or isinstance(node, ast.Yield):
                texts = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
                found |= {name for t in texts for name in re.findall(r"\b([a-z]\w+)(?==|: must| is required)", t)}
    return found & OPTIONS


def linked(cell: str) -> list[str]:
    return re.findall(r"\]\((\w+\.md)", cell)


@pytest.mark.parametrize("kind", CLASSES[1:], ids=lambda kind: kind.__name__)
def test_every_class_of_error_has_a_page_and_its_exit_code(kind: type[errors.BondError]) -> None:
    (row,) = [row for row in rows("By exit code") if row[1] == f"`{kind.__name__}`"]
    assert row[0] == str(kind.exit_code)
    assert linked(row[3]) or row[3] == "the table below"


def test_every_setting_that_a_message_names_has_a_page_that_speaks_of_it() -> None:
    table = {
        name: cells[1] for cells in rows("By the name in the message") for name in re.findall(r"`(\w+)`", cells[0])
    }
    named = names_in_errors()
    assert len(named) > 50
    assert named - set(table) == set()
    assert set(table) - OPTIONS == set()
    for name, cell in table.items():
        pages = [DOCS / page for page in linked(cell)] or [DOCS / "troubleshooting.md"]
        assert any(re.search(rf"\b{name}\b", page.read_text(encoding="utf-8")) for page in pages), (name, cell)
