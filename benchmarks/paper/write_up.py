"""Tables, figures and verdicts of the study, generated from the finished runs.

    python benchmarks/paper/write_up.py [--runs runs/paper] [--results benchmarks/paper/results]

Writes results/runs.jsonl (every measurement of every finished run), results/summary.csv (the last one of each run), a
figure per experiment, claims.md and verdicts.md. A verdict needs three seeds: it is the paired difference between two
runs, seed by seed, with a t interval.
"""

import argparse
import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from plans import EXPERIMENTS
from verdicts import VERDICTS, Table, Verdict

from bondlm.bestofn import kl_bound

ROOT = Path(__file__).parents[2]
FINDINGS = Path(__file__).parent / "findings.md"  # what the tables do not show, written by hand
COLUMNS = (
    "experiment",
    "run",
    "seed",
    "step",
    "tokens",
    "seconds",
    "cpu_seconds",
    "effective_n",
    "effective_n_low",
    "win_rate",
)
MEASURES = ("mean_quantile", "log_quantile", "kl", "kl_ratio", "reward", "length", "entropy")


def read(folder: Path) -> list[dict[str, Any]]:
    """One flat row per measurement of each finished run."""
    rows = []
    for done in sorted(folder.glob("*/*/done.json")):
        facts = json.loads(done.read_text(encoding="utf-8"))
        common = {"experiment": done.parent.parent.name, "run": facts["run"], "seed": facts["seed"]}
        points = [json.loads(x) for x in (done.parent / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
        for i, point in enumerate(points):
            rows.append(
                common
                | flat(point)
                | {"is_last": i == len(points) - 1, "command": facts["command"]}
                | {"versions": facts["versions"], "commit": facts["commit"], "machine": facts["machine"]}
            )
    return rows


def with_earlier(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows, and those in the committed results of runs that were made in another run folder."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    here = {(row["experiment"], row["run"], row["seed"]) for row in rows}
    earlier = [json.loads(line) for line in lines]
    rows = rows + [row for row in earlier if (row["experiment"], row["run"], row["seed"]) not in here]
    rows = [row | {"kl_ratio": wasted(row["kl"], row["win_rate"])} for row in rows]
    return sorted(rows, key=lambda row: (row["experiment"], row["run"], row["seed"], row["step"]))


def wasted(kl: float, win_rate: float) -> float | None:
    """KL over what Best-of-n of a continuous reward needs for this win rate, n / (n + 1). Also defined beyond the N
    that the reference's samples can show."""
    n = win_rate / (1 - win_rate) if win_rate < 1 else math.inf
    return kl / kl_bound(n) if 1.05 < n < math.inf else None


def flat(point: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a measurement under plain names; the win rate is the mean quantile with ties half."""
    row = {name: point[name] for name in ("step", "tokens", "seconds", "cpu_seconds", "kl_ratio", "entropy")}
    for name in ("effective_n", "win_rate", "kl", "reward", "log_quantile"):
        row |= {name: point[name]["value"], f"{name}_low": point[name]["low"], f"{name}_high": point[name]["high"]}
    row |= {"mean_quantile": row["win_rate"], "length": point["completions/mean_length"]}
    for name, judge in point["judges"].items():
        row |= {f"judge/{name}": judge["gain"]["value"], f"judge/{name}_low": judge["gain"]["low"]}
        row |= {f"judge/{name}_high": judge["gain"]["high"]}
    for opponent in point["against_best_of"]:
        for kind in ("forward_kl", "backward_kl"):
            row[f"{kind}/{opponent['n']}"] = (opponent.get(kind) or {}).get("value")
    return row


def finals(rows: list[dict[str, Any]], experiment: str) -> Table:
    """{run: {seed: last measurement}} of an experiment, in the order of the plan."""
    table: Table = {run.name: {} for run in EXPERIMENTS[experiment].runs}
    for run, seeds in curves(rows, experiment).items():
        for seed, points in seeds.items() if run in table else ():
            crossing = {f"{name}_at_0.8": at_win_rate(points, 0.8, name) for name in ("kl", "cpu_seconds")}
            table[run][seed] = points[-1] | crossing
    return {run: seeds for run, seeds in table.items() if seeds}


def curves(rows: list[dict[str, Any]], experiment: str) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """{run: {seed: measurements}}."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["experiment"] == experiment:
            found[row["run"]][row["seed"]].append(row)
    return {run: dict(seeds) for run, seeds in found.items()}


def at_win_rate(points: list[dict[str, Any]], level: float, measure: str) -> float | None:
    """`measure` where a curve first reaches a win rate, interpolated linearly between measurements from (1/2, 0) on."""
    before_win, before = 0.5, 0.0
    for point in points:
        if point.get(measure) is None:  # not recorded in early runs
            return None
        if point["win_rate"] >= level:
            share = (level - before_win) / (point["win_rate"] - before_win)
            return float(before + share * (point[measure] - before))
        before_win, before = point["win_rate"], point[measure]
    return None


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def spread(values: list[float | None]) -> str:
    """`mean (lowest to highest seed)`; "-" where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    ends = f" ({min(known):.3g} to {max(known):.3g})" if len(known) > 1 else ""
    return f"{sum(known) / len(known):.3g}{ends}"


def table_text(table: Table) -> str:
    """The last measurements of an experiment's runs: mean over seeds with the extremes."""
    judges = sorted({name for seeds in table.values() for row in seeds.values() for name in row if is_judge(name)})
    names = {"effective_n": "effective N", "win_rate": "win rate", "log_quantile": "log-quantile", "kl": "KL"}
    names |= {"kl_ratio": "KL / Best-of-N's", "tokens": "tokens drawn", "cpu_seconds": "training CPU s"}
    names |= {"kl_at_0.8": "KL at win rate 0.8", "cpu_seconds_at_0.8": "CPU s to win rate 0.8"}
    names |= {name: f"gain of {name.removeprefix('judge/')}" for name in judges}
    lines = ["| run | seeds | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 2) + "|"]
    for run, seeds in table.items():
        cells = [spread([row.get(name) for row in seeds.values()]) for name in names]
        lines.append(f"| {run} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def is_judge(name: str) -> bool:
    return name.startswith("judge/") and not name.endswith(("_low", "_high"))


def draw(found: dict[str, dict[int, list[dict[str, Any]]]], title: str, path: Path, sharpened: list[Any]) -> None:
    """Win rate against KL (with exact Best-of-N and sharpening), tokens and CPU seconds; each judge against KL.

    Means over seeds; bars are their extremes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"kl": "KL to the reference, nats", "tokens": "tokens drawn", "cpu_seconds": "training CPU seconds"}
    known = [set(row) for seeds in found.values() for rows in seeds.values() for row in rows]
    judges = sorted(filter(is_judge, set.intersection(*known)))
    panels = [(x, "win_rate") for x in labels] + [("kl", judge) for judge in judges]
    lines = math.ceil(len(panels) / len(labels))
    figure, axes = plt.subplots(lines, len(labels), figsize=(15, 4.8 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (x, measure) in zip(axes.flat, panels, strict=False):
        for i, (run, seeds) in enumerate(found.items()):
            points = list(zip(*(seed_rows for seed_rows in equal_length(list(seeds.values()))), strict=True))
            xs = [mean([row.get(x) for row in point]) for point in points]
            if None in xs:  # not recorded in early runs
                continue
            ys = [[row[measure] for row in point] for point in points]
            middle = [sum(y) / len(y) for y in ys]
            errors = [
                [m - min(y) for m, y in zip(middle, ys, strict=True)],
                [max(y) - m for m, y in zip(middle, ys, strict=True)],
            ]
            style = {"color": plt.cm.tab20(i % 20), "marker": "os^v"[i % 4], "markersize": 4, "capsize": 2, "lw": 1.2}
            axis.errorbar(xs, middle, yerr=errors, label=f"{run} ({len(seeds)})", **style)
        if (x, measure) == panels[0]:
            exact = [1 + i / 20 for i in range(400)]
            axis.plot([kl_bound(n) for n in exact], [n / (n + 1) for n in exact], "k--", lw=1, label="exact Best-of-N")
            if sharpened:
                kls, wins = zip(*[(0.0, 0.5), *((each["kl"], each["win_rate"]) for each in sharpened)], strict=True)
                axis.plot(kls, wins, "k:", lw=1, label="reference at lower temperatures")
        gain = f"{measure.removeprefix('judge/')}, a judge: gain on the reference"
        axis.set(xlabel=labels[x], ylabel="win rate = mean quantile" if measure == "win_rate" else gain)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def equal_length(seeds: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Cut every seed to the number of points that all have: runs that stopped early have fewer."""
    shortest = min(map(len, seeds))
    return [rows[:shortest] for rows in seeds]


def claims_text(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Claims",
        "",
        "Written by `python benchmarks/paper/write_up.py`; do not edit. One line a claim of the paper.",
        "",
    ]
    lines += ["| | claim | here | numbers |", "|---|---|---|---|"]
    for name, experiment in EXPERIMENTS.items():
        verdicts = VERDICTS[name](finals(rows, name)) if name in VERDICTS else []
        for part in verdicts or [Verdict("not tested here", experiment.claim, "")]:
            lines.append(f"| {name.upper()} | {part.claim} | **{part.word}** | {part.numbers} |")
    return "\n".join(lines) + "\n"


def results_text(rows: list[dict[str, Any]]) -> str:
    """The text of verdicts.md."""
    parts = [
        "# Verdicts of the study\n\nWritten by `python benchmarks/paper/write_up.py` from the finished runs of "
        "`benchmarks/paper/run.py` and `findings.md` beside it; do not edit. How it was done, and what the words mean: "
        "[README.md](README.md).\n",
        claims_text(rows).replace("# Claims", "## Claims", 1),
    ]
    parts.append(FINDINGS.read_text(encoding="utf-8"))
    for name, experiment in EXPERIMENTS.items():
        table = finals(rows, name)
        parts.append(f"## {name.upper()}: {experiment.claim}\n")
        if not table:
            parts.append(f"Not run yet: `python benchmarks/paper/run.py {name}`.\n")
            continue
        parts.append(f"Task: {experiment.task}. Last measurement, mean over seeds (lowest to highest).\n")
        parts.append(table_text(table) + "\n")
        parts.append(f"![{name}](results/{name}.png)\n")
        made = {facts_text(row): None for seeds in table.values() for row in seeds.values()}
        parts.append("\n".join(made) + "\n")
    return "\n".join(parts)


def facts_text(row: dict[str, Any]) -> str:
    """How a run was made, as a list item."""
    versions = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
    return f"- `{row['command']}` at {row['commit']}; {versions}; {row['machine']}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/paper/results")
    parser.add_argument("--page", type=Path, default=ROOT / "benchmarks/paper/verdicts.md")
    args = parser.parse_args(argv)
    rows = with_earlier(read(args.runs), args.results / "runs.jsonl")
    args.results.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (args.results / "runs.jsonl").write_text(text, encoding="utf-8")
    with (args.results / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*COLUMNS, *MEASURES], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in rows if row["is_last"])
    path = args.results / "sharpened.json"
    rivals = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, experiment in EXPERIMENTS.items():
        found = curves(rows, name)
        if found:
            sharpened = rivals.get(experiment.task, {}).get("points", [])
            draw(found, f"{name}: {experiment.claim}", args.results / f"{name}.png", sharpened)
    (args.results.parent / "claims.md").write_text(claims_text(rows), encoding="utf-8")
    args.page.write_text(results_text(rows), encoding="utf-8")
    print(f"{len({(r['experiment'], r['run'], r['seed']) for r in rows})} finished runs -> {args.results}, {args.page}")


if __name__ == "__main__":
    main()
