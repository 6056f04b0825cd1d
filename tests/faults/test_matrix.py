"""Every row of the fault matrix is a test that is named after it, or is listed in README.md with the reason."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
LAST = {"d": 15, "s": 10, "n": 12, "r": 14, "t": 13, "m": 5, "x": 11}
ROWS = {f"{letter}{i}" for letter, last in LAST.items() for i in range(1, last + 1)} | {"n0"}


def rows_with_a_test() -> set[str]:
    names = {
        node.name
        for path in HERE.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    return {match.group(1) for name in names if (match := re.match(r"test_([a-z]\d+)_", name))}


def listed() -> dict[str, str]:
    """Rows of the tables of README.md: id, and what is said of it."""
    lines = (HERE / "README.md").read_text().splitlines()
    found = [re.match(r"\| ([A-Z]\d+) \| (.+) \|$", line) for line in lines]
    return {match.group(1).lower(): match.group(2) for match in found if match}


def test_every_row_is_a_test_or_is_listed() -> None:
    assert ROWS - rows_with_a_test() - set(listed()) == set()
    assert rows_with_a_test() <= ROWS
    assert set(listed()) <= ROWS
    assert all(len(reason) > 20 for reason in listed().values())
    assert len(rows_with_a_test()) > 40
