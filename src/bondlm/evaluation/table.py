"""Tables for the terminal; control characters in completions are made visible."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bondlm.bestofn import EffectiveN
from bondlm.runs import redact
from bondlm.runs.worth import at_least, below

NUM_SHOWN = 4
PIPE_WIDTH = 120  # without a terminal, rich assumes 80 columns, which breaks tables and lines in log files


def visible(text: str) -> Text:
    """`bondlm.runs.redact.visible`, without markup."""
    return Text(redact.visible(text))


def wide_console() -> Console:
    """A console on stdout; if that is neither a terminal nor a notebook, it is as wide as the tables."""
    console = Console(markup=False, highlight=False)
    if not (console.is_terminal or console.is_jupyter):
        console.width = PIPE_WIDTH
    return console


def narrow_table(title: str, *columns: str, left: int = 1) -> Table:
    """A table for 80 columns; the first `left` columns are words, the others numbers."""
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right")
    return table


def print_table(console: Console, result: Mapping[str, Any], *, headline: bool = True) -> None:
    """Print the policy and its baselines, all against the same reference samples, and then the details.

    Without `headline`, the caller prints the headline.
    """
    title = f"Held-out prompts: {result['num_prompts']}. 95% intervals, bootstrap over prompts."
    table = narrow_table(title, "", "reward", "win rate", "effective N", "KL")
    _add_distributions(table, result, _row)
    console.print(table)
    _print_details(console, result)
    _print_goals(console, result.get("goals", {}))
    _print_judges(console, result.get("judges", {}))
    _print_pairwise(console, result.get("pairwise", {}))
    for warning in result.get("warnings", ()):
        console.print(visible(f"warning: {warning}"), soft_wrap=True)
    if "opponent" in result:
        meeting = f"Win rate against {result.get('opponent_model', 'the opponent')}: "
        console.print(visible(meeting + spread(result["opponent"]["win_rate"], 3)), soft_wrap=True)
    _print_cost(console, result)
    if headline:
        worth = f"= Best-of-{result['effective_n']['text']} of the untouched one"
        needs = f"Best-of-N itself needs {at_least(result)}{result['kl_of_best_of_n']:.2f}"
        at = f", at KL {spread(result['kl'], 2)} nats ({needs})"
        lost = below(result, "the untouched one")
        console.print(f"One sample of the trained model {worth + at if lost is None else f'is {lost}'}.")


def _add_distributions(
    table: Table, result: Mapping[str, Any], row: Callable[[str, Mapping[str, Any]], list[str]]
) -> None:
    baselines = result["baselines"]
    table.add_row(*row("untouched, T=1", baselines["reference"]))
    for name, numbers in baselines.items():
        if name.startswith("reference, "):
            cells = row(_untouched(name), numbers)
            if any(cells[1:]):
                table.add_row(*cells)
    table.add_section()
    table.add_row(*row("trained, T=1", result), style="bold")
    table.add_row(*row("trained, greedy", baselines["policy, greedy"]))


def _untouched(name: str) -> str:
    """The name of a baseline of the reference; the longest of these names sets the width of two tables."""
    how = name.removeprefix("reference, ")
    return f"{how} untouched" if how.startswith("best of") else f"untouched, {how}"


def _print_details(console: Console, result: Mapping[str, Any]) -> None:
    """Print measures of the distributions and of verbosity, and the policy against Best-of-n for each n."""
    columns = ("", "log-quantile", "tokens", "cut off", "distinct-2", "reward-length\ncorrelation")
    table = narrow_table("Order and length (mean log-quantile of Best-of-N: -1/N)", *columns)
    _add_distributions(table, result, _detail_row)
    console.print(table)
    kls = [f"{name} {spread(result[key], 3)}" for key, name in KL_ESTIMATES if key in result]
    console.print(f"KL to the untouched model, nats: {', '.join(kls)}", soft_wrap=True)
    if not result.get("against_best_of"):
        return
    against = ("n", "win rate", "KL from Best-of-n\n(forward)", "KL to Best-of-n\n(backward)")
    table = narrow_table("The trained model against Best-of-n of the untouched one", *against, left=0)
    for point in result["against_best_of"]:
        cells = (spread(point[name], digits) for name, digits in AGAINST)
        table.add_row(str(point["n"]), *cells)
    console.print(table)


KL_ESTIMATES = (
    ("kl", "k1"),
    ("kl_k3", "k3"),
    ("kl_per_token", "k1 per token"),
    ("kl_k3_per_token", "k3 per token"),
)
AGAINST = (("win_rate", 3), ("forward_kl", 2), ("backward_kl", 2))


def _detail_row(name: str, numbers: Mapping[str, Any]) -> list[str]:
    correlation = numbers.get("reward_length_correlation")
    known = correlation is not None and math.isfinite(correlation)
    log_quantile = spread(numbers["log_quantile"], 3) if "log_quantile" in numbers else ""
    return [
        name,
        log_quantile,
        _number(numbers, "completions/mean_length", "{:.1f}"),
        _number(numbers, "completions/clipped_ratio", "{:.0%}"),
        _number(numbers, "distinct_2", "{:.2f}"),
        f"{correlation:.2f}" if known else "",
    ]


def _print_cost(console: Console, result: Mapping[str, Any]) -> None:
    cost = result.get("cost")
    if cost is not None:
        bound = at_least(result)
        best = (
            f"; Best-of-{'N' if bound else cost['n']} of the untouched model: {bound}{cost['best_of_n_tokens']:.0f} "
            f"tokens, and {bound}{cost['n']:.0f} rewards"
        )
        text = f"One answer: {cost['tokens']:.0f} tokens{best if cost['n'] > 1 else ''}."
        console.print(text, soft_wrap=True)


def print_evaluation(
    console: Console, step: int, metrics: Mapping[str, float], max_n: int, prefix: str | None = None
) -> None:
    """Print a compact table of an evaluation in training from its logged numbers, whose names begin with `prefix`."""
    if prefix is None:
        prefix = next(name for name in metrics if name.endswith("_effective_n")).removesuffix("_effective_n")
    name = prefix.removeprefix("eval").removeprefix("_")
    which = f" of {name}" if name else ""
    title = f"step {step}: held-out prompts{which}, {metrics.get(f'{prefix}_runtime', 0.0):.1f} s"
    table = narrow_table(title, "effective N", "win rate", "reward", "untouched", "KL", "tokens", left=0)
    value, low, high = (metrics[f"{prefix}_effective_n{tail}"] for tail in ENDS.values())
    cells = [
        spread({end: metrics[f"{prefix}_{name}{tail}"] for end, tail in ENDS.items()}, digits)
        for name, digits in (("win_rate", 3), ("reward", 3), ("reference_reward", 3), ("kl", 2))
    ]
    length = metrics.get(f"{prefix}_completions/mean_length")
    table.add_row(str(EffectiveN(value, low, high, max_n)), *cells, "" if length is None else f"{length:.1f}")
    console.print(table)


ENDS = {"value": "", "low": "_low", "high": "_high"}


def print_curve(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one row for each point between a merge of runs and their reference."""
    columns = ("toward\nreference", "win rate", "effective N", "KL", "KL of\nBest-of-N", "reward")
    title = "From the merge (0) to the reference (1). 95% intervals over prompts."
    table = narrow_table(title, *columns, left=0)
    for row in rows:
        worth, needed = str(row["effective_n"]["text"]), f"{'≥ ' if at_least(row) else ''}{row['kl_of_best_of_n']:.2f}"
        cells = (spread(row["win_rate"], 3), worth, spread(row["kl"], 2), needed)
        table.add_row(f"{row['toward_reference']:g}", *cells, spread(row["reward"], 3))
    console.print(table)


def _row(name: str, numbers: Mapping[str, Any]) -> list[str]:
    def cell(key: str, digits: int) -> str:
        if key not in numbers:
            return ""
        return spread(numbers[key], digits)

    worth = str(numbers["effective_n"]["text"]) if "effective_n" in numbers else ""
    return [name, cell("reward", 3), cell("win_rate", 3), worth, cell("kl", 2)]


def _number(numbers: Mapping[str, Any], key: str, shape: str) -> str:
    """The number in this form; empty if it is missing or not finite, such as distinct-2 of one-word answers."""
    value = numbers.get(key)
    return "" if value is None or not math.isfinite(value) else shape.format(value)


def _print_goals(console: Console, goals: Mapping[str, Any]) -> None:
    """Print each of several rewards, to show what the gain cost the others."""
    if not goals:
        return
    columns = ("reward", "untouched", "trained", "win rate", "effective N", "prompts")
    table = narrow_table("Each reward by itself", *columns)
    for name, numbers in goals.items():
        cells = (spread(numbers[key], 3) for key in ("reference_reward", "reward", "win_rate"))
        table.add_row(visible(name), *cells, numbers["effective_n"]["text"], str(numbers["num_prompts"]))
    console.print(table)


def _print_judges(console: Console, judges: Mapping[str, Any]) -> None:
    """Print rewards that were not optimised, to show whether they confirm the gain."""
    if not judges:
        return
    table = narrow_table("Judges that were not optimised", "judge", "untouched", "trained", "win rate")
    for name, numbers in judges.items():
        cells = (spread(numbers[key], 3) for key in ("reference_reward", "reward", "win_rate"))
        table.add_row(visible(name), *cells)
    console.print(table)


def _print_pairwise(console: Console, judges: Mapping[str, Any]) -> None:
    """Print judges that compare two answers: one sample of the trained model against one of the untouched model."""
    for name, numbers in judges.items():
        title = f"Before the judge {visible(name)}: one answer against another, in both orders"
        table = narrow_table(title, "against", "win rate", "prompts")
        for opponent, wins in numbers["win_rate"].items():
            table.add_row("untouched" + opponent.removeprefix("reference"), spread(wins, 3), str(wins["num_prompts"]))
        console.print(table)
        decided = numbers["num_decided"]
        tied = numbers["num_pairs"] - numbers["num_failed"] - decided
        undecided = f"; in {tied} it has no preference" if tied > 0 else ""
        says = f"decides {numbers['agreement']:.0%} of {decided} pairs alike in both orders{undecided}"
        if not decided:
            says = f"has no preference in any of {tied} pairs"
        failed = f"; {numbers['num_failed']} were not ranked and are left out" if numbers["num_failed"] else ""
        console.print(f"{visible(name)} {says}{failed}.", soft_wrap=True)


def spread(numbers: Mapping[str, float], digits: int) -> str:
    """The value with its interval, if that is known; empty if the value is not finite.

    "0.750 ±0.250" has half the interval's width. "1.000 [0.912, 1.000]" has its ends: one of them is more than twice as
    far from the value as the other, and ± would show another interval.
    """
    value, low, high = numbers["value"], numbers["low"], numbers["high"]
    if not math.isfinite(value):
        return ""
    shown, half = f"{value:.{digits}f}", (high - low) / 2
    if not math.isfinite(half):
        return shown
    shift = abs((low + high) / 2 - value)
    if shift > half / 3 and shift > 0.5 * 10**-digits:
        return f"{shown} [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{shown} ±{half:.{digits}f}"


def print_samples(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print samples for a few prompts, evenly spread over the set and not hand-picked."""
    chosen = rows[:: max(1, len(rows) // NUM_SHOWN)][:NUM_SHOWN]
    table = Table(title="Before and after: one random sample each, for evenly spaced prompts", show_lines=True)
    for key in rows[0]:
        table.add_column(key.replace("_", " "), ratio=1)
    for row in chosen:
        cells = [
            visible(v) if isinstance(v, str) else visible(f"{v['text']}\n({v['reward']:.2f})") for v in row.values()
        ]
        table.add_row(*cells)
    console.print(table)


# The metric that counts the completion tokens of each phase.
PHASE_TOKENS = {"generate": "num_tokens", "reward": "num_tokens", "reference": "num_tokens/compared"}
PHASE_TOKENS |= {"learn": "num_tokens/learned"}
PHASE_NAMES = {"reward": "score (rewards)", "reference": "anchor and reference log-probs", "learn": "forward, backward"}


def print_phases(
    console: Console, seconds: Mapping[str, float], tokens: Mapping[str, float], evaluation: float = 0.0
) -> None:
    """Print the phases of a mean training step, with completion tokens per second, and the evaluations' total time."""
    total = sum(seconds.values())
    if total == 0:
        return
    sampled = f", {tokens['num_tokens']:.0f} tokens sampled" if "num_tokens" in tokens else ""
    table = narrow_table(f"A mean step: {total:.1f} s{sampled}", "phase", "seconds", "share", "tokens/s")
    for phase, value in sorted(seconds.items(), key=lambda item: -item[1]):
        count = tokens.get(PHASE_TOKENS.get(phase, ""), 0.0)
        rate = f"{count / value:.0f}" if count and value else ""
        table.add_row(PHASE_NAMES.get(phase, phase), f"{value:.2f}", f"{value / total:.0%}", rate)
    if evaluation:
        table.add_row("evaluations, all steps", f"{evaluation:.1f}", "", "")
    console.print(table)
