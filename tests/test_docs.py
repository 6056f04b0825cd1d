"""The pages hold what they promise: no gap that was to be filled later, and tables that are what the code computes."""

import re
from pathlib import Path

import numpy as np
import pytest

from bondlm.bestofn import best_of_n_probs, bond_fixed_point, kl_bound, kl_divergence, self_bond_fixed_point
from bondlm.bestofn.own_quantiles import kl_over_best_of_n, reached_by

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/*/README.md"), ROOT / "recipes/README.md"]
PAGES.sort()
PLACEHOLDER = re.compile(r"^\s*[A-Z][A-Z0-9]*(_[A-Z0-9]+)+\s*$|\b(TODO|TBD|FIXME|XXX)\b")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_placeholder_is_left(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [(i, line) for i, line in enumerate(lines, 1) if PLACEHOLDER.search(line)] == []


def test_the_check_of_placeholders_sees_them() -> None:
    assert all(PLACEHOLDER.search(line) for line in ("FIXED_POINT_TABLE", "  SOME_TABLE_2 ", "TODO: later"))
    assert not any(PLACEHOLDER.search(line) for line in ("set HF_TOKEN in the environment", "J-BOND", "| X9 |"))


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def dead_links(path: Path, text: str) -> list[str]:
    """Relative links of a page whose file, or whose heading in a page, does not exist."""
    dead = []
    for link in re.findall(r"(?<!\\)\]\((?!\w+:|/)([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if name and not target.exists():
            dead.append(link)
        elif anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", text if not name else target.read_text(encoding="utf-8"), re.M)
            if anchor not in map(slug, headings):
                dead.append(link)
    return dead


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(path: Path) -> None:
    assert dead_links(path, path.read_text(encoding="utf-8")) == []


def test_the_check_of_links_sees_them() -> None:
    text = "# A (b), `c`\n[x](nowhere.md) [y](data.md#rows) [z](data.md#columns) [v](#a-b-c) [w](#a) [u](https://x.y)"
    assert dead_links(ROOT / "docs" / "new.md", text) == ["nowhere.md", "data.md#columns", "#a"]


def long_lines(text: str) -> list[str]:
    """Lines of prose over 120 characters: no code, table, image or comment."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S).splitlines()
    return [line for line in prose if len(line) > 120 and not line.lstrip().startswith(("|", "<!--", "!["))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_has_lines_of_120_characters_at_most(path: Path) -> None:
    assert long_lines(path.read_text(encoding="utf-8")) == []


def test_the_check_of_lines_sees_them() -> None:
    long = "word " * 30
    text = f"short\n{long}\n- {long}\n| {long} |\n```bash\n{long}\n```\n![{long}](x.png)\n<!-- {long} -->"
    assert long_lines(text) == [long, f"- {long}"]


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


def table_cells(begin: str) -> list[list[str]]:
    """The rows of docs/theory.md's table between two comments, the head included."""
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    table = text[text.index(f"<!-- {begin} -->") : text.index(f"<!-- end of {begin} -->")]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return [row for row in rows if not row[0].startswith("-")]


def test_the_price_of_own_quantiles_is_what_is_computed() -> None:
    rows = table_cells("own quantiles")[1:]
    assert len(rows) == 10
    for num_samples, form, *printed in rows[:-1]:
        for n, seen in zip((2, 4, 8, 16), printed, strict=True):
            computed = kl_over_best_of_n(n, int(num_samples), form)  # type: ignore[arg-type]
            assert computed == pytest.approx(float(seen), abs=6e-3), (num_samples, form, n)
    for n, seen in zip((2, 4, 8, 16), rows[-1][2:], strict=True):
        assert kl_over_best_of_n(n, 400, "tilt") == pytest.approx(float(seen), abs=0.012)


def test_the_pass_rates_of_own_quantiles_are_the_oracles() -> None:
    head, *rows = table_cells("pass rates")
    p = np.array([float(cell) for cell in head[2:]])
    n = 0
    for order, form, *printed in rows:
        n = int(order.removeprefix("n = ")) if order else n
        computed = 1 - (1 - p) ** n
        if order == "":
            ref, rewards = np.stack([1 - p, p], 1), np.tile([0.0, 1.0], (len(p), 1))
            computed = self_bond_fixed_point(ref, rewards, n, 8, form)[:, 1]  # type: ignore[arg-type]
        np.testing.assert_allclose([float(cell) for cell in printed], computed, atol=6e-4)
    assert n == 8


def test_the_n_that_gamma_ref_keeps_is_what_is_computed() -> None:
    rows = table_cells("resting points")
    for beta, orders, ratios in ((0.5, rows[1], rows[2]), (1.0, rows[3], rows[4])):
        for gamma_ref, order, ratio in zip(rows[0][1:], orders[1:], ratios[1:], strict=True):
            law = reached_by(np.array([-beta * np.log(16), 1 - beta, 2 * (1 - beta)]) / float(gamma_ref))
            reached = law.win_rate / (1 - law.win_rate)
            assert reached == pytest.approx(float(order), rel=0.025)
            assert law.kl / kl_bound(reached) == pytest.approx(float(ratio), abs=6e-3)


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


def test_the_page_of_results_has_the_numbers_of_the_study() -> None:
    """Each decimal number of docs/results.md stands as it is in the generated verdicts or the findings there."""
    study = (ROOT / "benchmarks" / "paper" / "verdicts.md").read_text(encoding="utf-8")
    known = set(re.findall(r"(?<![\d.])\d+\.\d+", study))
    page = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), flags=re.S)
    numbers = set(re.findall(r"\d+\.\d+", page))
    assert len(numbers) > 25
    assert numbers - known == set()
