"""From numbers to words: `holds`, `does not hold`, `not decided`, `not tested here`.

Each part of a claim compares two runs seed by seed; both share prompts, reference samples and data order. The claim
holds if the 95% t interval of the difference over seeds lies on the right side of 0, does not hold if it lies on the
wrong side, and is not decided otherwise. Fewer than three seeds decide nothing.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Table = dict[str, dict[int, dict[str, Any]]]  # run -> seed -> last measurement
MIN_SEEDS = 3
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by number of seeds


class Verdict(NamedTuple):
    """One line of claims.md."""

    word: str
    claim: str
    numbers: str


def differences(table: Table, first: str, second: str, measure: str) -> list[float]:
    """first - second for every seed that both runs have."""
    mine, theirs = table.get(first, {}), table.get(second, {})
    pairs = [(mine[s].get(measure), theirs[s].get(measure)) for s in sorted(set(mine) & set(theirs))]
    return [a - b for a, b in pairs if a is not None and b is not None]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95% t interval over seeds (no interval from fewer than 2)."""
    n = len(values)
    middle = sum(values) / n
    if n < 2:
        return middle, -math.inf, math.inf
    deviation = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1))
    half = T_95.get(n, 2.2) * deviation / math.sqrt(n)
    return middle, middle - half, middle + half


def compare(
    table: Table, first: str, second: str, measure: str, claim: str, *, tolerance: float | None = None
) -> Verdict:
    """Whether `first` has more of `measure` than `second`; with a tolerance, whether they are equal within it."""
    values = differences(table, first, second, measure)
    if not values:
        return Verdict("not tested here", claim, "")
    middle, low, high = interval(values)
    text = f"{measure}: {first} - {second} = {middle:+.3g}"
    if len(values) < MIN_SEEDS:
        return Verdict("not tested here", claim, f"{text} ({len(values)} of {MIN_SEEDS} seeds)")
    text += f" [{low:.3g}, {high:.3g}], {len(values)} seeds"
    if tolerance is not None:
        inside, outside = -tolerance <= low and high <= tolerance, high < -tolerance or low > tolerance
        return Verdict(
            "holds" if inside else "does not hold" if outside else "not decided",
            claim,
            f"{text}, tolerance {tolerance}",
        )
    return Verdict("holds" if low > 0 else "does not hold" if high < 0 else "not decided", claim, text)


def x1(table: Table) -> list[Verdict]:
    found = []
    for n in (4, 8):
        half, zero, one = f"n{n}-beta0.5", f"n{n}-beta0.0", f"n{n}-beta1.0"
        found += [
            compare(table, zero, half, f"backward_kl/{n}", f"N={n}: beta 0 leaves the backward KL higher than 0.5"),
            compare(table, one, half, f"forward_kl/{n}", f"N={n}: beta 1 leaves the forward KL higher than 0.5"),
            compare(table, half, zero, "log_quantile", f"N={n}: log-quantile of beta 0.5 above beta 0"),
            compare(table, half, one, "log_quantile", f"N={n}: log-quantile of beta 0.5 near beta 1", tolerance=0.05),
        ]
    return found


def x2(table: Table) -> list[Verdict]:
    return [
        compare(table, "iterated-n4", "iterated-n2", "log_quantile", "iterated n=4 rises faster than n=2"),
        compare(table, "iterated-n4", "fixed-n4", "log_quantile", "iterated n=4 ends above fixed N=4"),
        compare(table, "fixed-n8", "fixed-n4", "log_quantile", "fixed N=8 saturates above N=4"),
        compare(table, "fixed-n16", "fixed-n8", "log_quantile", "fixed N=16 saturates above N=8"),
    ]


def x3(table: Table) -> list[Verdict]:
    names = (("log_quantile", 0.05), ("backward_kl/8", 0.3), ("forward_kl/8", 0.3))
    return [
        compare(
            table, "learned", "monte-carlo", name, f"learned and Monte-Carlo quantile: same {name}", tolerance=tolerance
        )
        for name, tolerance in names
    ]


def x4(table: Table) -> list[Verdict]:
    return [
        compare(table, "ema", "periodic", "win_rate", "EMA anchor: same win rate as the copied one", tolerance=0.05),
        compare(table, "periodic", "ema", "kl", "EMA anchor: lower KL"),
    ]


def x5(table: Table) -> list[Verdict]:
    return [
        compare(table, f"eta{high}", f"eta{low}", "win_rate", f"eta {high} rises faster than {low}")
        for low, high in ((0.02, 0.1), (0.1, 0.3))
    ]


def x6(table: Table) -> list[Verdict]:
    return [
        part
        for gamma in (0.5, 2.0)
        for part in (
            compare(table, "gamma0.0", f"gamma{gamma}", "kl", f"gamma {gamma}: lower KL than without"),
            compare(
                table, "gamma0.0", f"gamma{gamma}", "kl_ratio", f"gamma {gamma}: less KL for the N that it reaches"
            ),
        )
    ]


def x7(table: Table) -> list[Verdict]:
    mine = "jbond-eta0.3"  # its N is comparable to RLOO's; a run that has hardly moved has a high ratio
    return [
        compare(table, f"rloo-beta{b}", mine, "kl_ratio", f"J-BOND spends less KL for its N than RLOO at beta_RL {b}")
        for b in (0.001, 0.01, 0.1, 1.0)
    ]


def x9(table: Table) -> list[Verdict]:
    rivals = [run for run in table if not run.startswith("jbond")]
    return [
        compare(table, rival, "jbond-eta0.3", "kl_ratio", f"J-BOND (eta 0.3) spends less KL for its N than {rival}")
        for rival in rivals
    ] + [
        compare(table, "jbond-eta0.3", rival, "win_rate", f"J-BOND (eta 0.3) wins more than {rival}")
        for rival in rivals
    ]


def over(table: Table) -> list[Verdict]:
    judges = sorted(
        {
            name
            for seeds in table.values()
            for row in seeds.values()
            for name in row
            if name.startswith("judge/") and not name.endswith(("_low", "_high"))
        }
    )
    return [
        compare(table, guard, "free", judge, f"{guard}: {judge.removeprefix('judge/')} ends above that of the free run")
        for guard in ("target-n4", "kl-budget1", "gamma2", "eta0.1-gamma2")
        for judge in judges
    ]


VERDICTS: dict[str, Callable[[Table], list[Verdict]]] = {
    "x1": x1,
    "x2": x2,
    "x3": x3,
    "x4": x4,
    "x5": x5,
    "x6": x6,
    "x7": x7,
    "x9": x9,
    "over": over,
}
