"""The pages hold what they promise: no gap that was to be filled later, and tables that are what the code computes."""

import re
from pathlib import Path

import numpy as np
import pytest

from bondlm.bestofn import best_of_n_probs, bond_fixed_point, kl_divergence

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
PLACEHOLDER = re.compile(r"^\s*[A-Z][A-Z0-9]*(_[A-Z0-9]+)+\s*$|\b(TODO|TBD|FIXME|XXX)\b")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_placeholder_is_left(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [(i, line) for i, line in enumerate(lines, 1) if PLACEHOLDER.search(line)] == []


def test_the_check_of_placeholders_sees_them() -> None:
    assert all(PLACEHOLDER.search(line) for line in ("FIXED_POINT_TABLE", "  SOME_TABLE_2 ", "TODO: later"))
    assert not any(PLACEHOLDER.search(line) for line in ("set HF_TOKEN in the environment", "J-BOND", "| X9 |"))


def test_the_fixed_points_are_those_of_the_oracle() -> None:
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    table = text[text.index("<!-- fixed points -->") : text.index("<!-- end of fixed points -->")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) == 9
    anchor, rewards = np.full(512, 1 / 512), np.arange(512.0)
    for estimate, k, beta, *printed in rows:
        name = estimate.split("`")[1]
        for n, seen in zip((2, 4, 8, 16), printed, strict=True):
            fixed = bond_fixed_point(anchor, rewards, n, float(beta), estimate=name, k=int(k))  # type: ignore[arg-type]
            distance = float(kl_divergence(fixed, best_of_n_probs(anchor, rewards, n)))
            # The tiniest are near the tolerance of the oracle's descent.
            assert distance == pytest.approx(float(seen), rel=0.05, abs=2e-8), (name, k, beta, n)


def test_what_the_page_says_of_ties_is_what_the_oracle_finds() -> None:
    """docs/objectives.md, "Ties": pass rate 5%, n = 8, beta = 1."""
    text = " ".join((ROOT / "docs" / "objectives.md").read_text(encoding="utf-8").split())
    assert "0.20 nats at p = 5%, n = 8, beta = 1 (7.0% pass instead of 33.7%)" in text
    p, n = 0.05, 8
    anchor, rewards = np.array([1 - p, p]), np.array([0.0, 1.0])
    fixed, best = bond_fixed_point(anchor, rewards, n, 1.0), best_of_n_probs(anchor, rewards, n)
    assert fixed[1] / fixed[0] == pytest.approx(p / (1 - p) ** n)
    assert best[1] / best[0] == pytest.approx((1 - (1 - p) ** n) / (1 - p) ** n)
    assert (fixed[1], best[1]) == pytest.approx((0.070, 0.337), abs=5e-4)
    assert float(kl_divergence(fixed, best)) == pytest.approx(0.20, abs=5e-3)
