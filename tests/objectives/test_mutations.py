"""Every wrong sign is found: the real source, changed in one place, must fail the checks that it passes as it is."""

from pathlib import Path

import pytest

from .mutants import MUTATIONS, defects, mutate, objective_module
from .tables import OBJECTIVES

THEORY = Path(__file__).parents[2] / "docs" / "theory.md"


def mutation_id(mutation):
    return f"{objective_module(mutation.objective).rpartition('.')[2]}: {mutation.what} ({mutation.module})"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_real_objectives_have_no_defect(name):
    assert defects(OBJECTIVES[name]) == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=mutation_id)
def test_a_wrong_term_is_found(mutation, monkeypatch):
    assert defects(mutation.objective) == []
    assert defects(mutate(mutation, monkeypatch)) != []


def test_the_list_in_the_docs_is_the_list_that_is_run():
    text = THEORY.read_text(encoding="utf-8")
    listed = text[text.index("<!-- mutations -->") : text.index("<!-- end of mutations -->")]
    rows = [line.strip("| ").split(" | ") for line in listed.splitlines() if line.startswith("| `")]
    expected = [[f"`{m.module}`", f"`{type(m.objective).__name__}`", m.what] for m in MUTATIONS]
    assert rows == expected
