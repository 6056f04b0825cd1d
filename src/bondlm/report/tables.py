"""The tables of a report, as text: one precision per column, and no empty columns."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bondlm.report import numbers
from bondlm.report.read import Run


class Table(NamedTuple):
    """A table of the page; the first column names the row."""

    header: list[str]
    rows: list[list[str]]


def tables(runs: Sequence[Run]) -> dict[str, Table]:
    """The comparison of runs, and for the first run its baselines, its judges and its comparison with Best-of-n."""
    result = runs[0].result
    return {
        "runs": _runs(runs),
        "baselines": _baselines(numbers.baseline_rows(result)),
        "judges": _judges(result.get("judges") or {}),
        "against": _against(result.get("against_best_of") or []),
    }


def warnings(runs: Sequence[Run]) -> list[str]:
    """Warnings of the evaluations, with the run's name if there are several, and why runs are not comparable."""
    own = [(run.name, text) for run in runs for text in run.result.get("warnings", [])]
    return [text if len(runs) == 1 else f"{name}: {text}" for name, text in own] + numbers.differences(runs)


def _runs(runs: Sequence[Run]) -> Table:
    results = [run.result for run in runs]
    return _table(
        [("run", [run.name for run in runs])],
        {
            "effective N": estimates([result["effective_n"] for result in results]),
            "win rate": estimates([result["win_rate"] for result in results]),
            "KL": estimates([result["kl"] for result in results]),
            "KL / Best-of-N's": plain([numbers.kl_ratio(result) for result in results]),
            "reward": estimates([result["reward"] for result in results]),
            "steps": plain([result.get("last_step") or result.get("steps") for result in results]),
            "mean length": plain([result.get("completions/mean_length") for result in results]),
        },
    )


def _baselines(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    def column(key: str, write: Callable[[list[Any]], list[str]]) -> list[str]:
        return write([row.get(key) for _, row in rows])

    return _table(
        [("sampled from", [name for name, _ in rows])],
        {
            "effective N": column("effective_n", estimates),
            "win rate": column("win_rate", estimates),
            "reward": column("reward", estimates),
            "mean length": column("completions/mean_length", plain),
            "cut off": column("completions/clipped_ratio", lambda values: [numbers.percent(v) for v in values]),
            "distinct-2": column("distinct_2", plain),
        },
    )


def _judges(judges: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = list(judges.values())
    return _table(
        [("judge", list(judges))],
        {
            "policy": [numbers.estimate(row.get("reward")) for row in rows],  # each judge has its own scale
            "reference": [numbers.estimate(row.get("reference_reward")) for row in rows],
            "win rate of the policy": estimates([row.get("win_rate") for row in rows]),
        },
    )


def _against(rows: Sequence[Mapping[str, Any]]) -> Table:
    return _table(
        [("policy against", [f"Best-of-{numbers.number(row.get('n'))}" for row in rows])],
        {
            "win rate": estimates([row.get("win_rate") for row in rows]),
            "forward KL": estimates([row.get("forward_kl") for row in rows]),
            "backward KL": estimates([row.get("backward_kl") for row in rows]),
        },
    )


def _table(names: list[tuple[str, list[str]]], columns: Mapping[str, list[str]]) -> Table:
    held = [(name, cells) for name, cells in columns.items() if any(cell != numbers.NONE for cell in cells)]
    kept = names + held
    return Table([name for name, _ in kept], [list(row) for row in zip(*(cells for _, cells in kept), strict=True)])


def estimates(values: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Estimates with as many decimals as the widest interval of the column supports, small ones with two digits."""
    known = [numbers.interval_decimals(value) for value in values if value and not value.get("text")]
    common = min((found for found in known if found is not None), default=None)
    return [numbers.estimate(value, None if common is None else _enough(value, common)) for value in values]


def _enough(value: Mapping[str, Any] | None, common: int) -> int:
    """`common`, or the decimals that show two digits of the number, if its interval supports them."""
    own = numbers.interval_decimals(value) if value and not value.get("text") else None
    if not value or own is None:
        return common
    largest = max(abs(value[end]) for end in ("value", "low", "high") if value[end] is not None)
    return max(common, min(own, 1 - math.floor(math.log10(largest))))


def plain(values: Sequence[float | None]) -> list[str]:
    """Numbers with the most decimals that one of the column's numbers shows."""
    shown = [numbers.number(value) for value in values]
    if any("e" in text for text in shown):
        return shown
    decimals = max((len(text.partition(".")[2]) for text in shown), default=0)
    return [numbers.NONE if value is None else f"{value:,.{decimals}f}" for value in values]
