"""Tables for the terminal; completions are shown as text, whatever control characters they hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

NUM_SHOWN = 4


def visible(text: str) -> Text:
    """`text` without markup, its control characters written as escapes."""
    return Text("".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def print_table(console: Console, result: Mapping[str, Any]) -> None:
    """The policy and its baselines, each against the same reference samples."""
    table = Table(title=f"Held-out prompts: {result['num_prompts']}. 95% intervals, bootstrap over prompts.")
    for name in ("", "reward", "win rate", "effective N", "KL", "tokens", "cut off", "distinct-2"):
        table.add_column(name, justify="left" if not name else "right")
    baselines = result["baselines"]
    table.add_row(*_row("untouched model, T=1", baselines["reference"]))
    for name, numbers in baselines.items():
        if name.startswith("reference, "):
            table.add_row(*_row("untouched" + name.removeprefix("reference"), numbers))
    table.add_section()
    table.add_row(*_row("trained model, T=1", result), style="bold")
    table.add_row(*_row("trained, greedy", baselines["policy, greedy"]))
    console.print(table)
    _print_judges(console, result.get("judges", {}))
    for warning in result.get("warnings", ()):
        console.print(visible(f"warning: {warning}"), soft_wrap=True)
    console.print(
        f"One sample of the trained model = Best-of-{result['effective_n']['text']} of the untouched one, at KL "
        f"{result['kl']['value']:.2f} nats (exact Best-of-N needs {result['kl_of_best_of_n']:.2f}).",
        highlight=False,
    )


def _row(name: str, numbers: Mapping[str, Any]) -> list[str]:
    def spread(key: str, digits: int) -> str:
        if key not in numbers:
            return ""
        return _spread(numbers[key], digits)

    def number(key: str, shape: str) -> str:
        return shape.format(numbers[key]) if key in numbers else ""

    return [
        name,
        spread("reward", 3),
        spread("win_rate", 3),
        str(numbers["effective_n"]["text"]) if "effective_n" in numbers else "",
        spread("kl", 2),
        number("completions/mean_length", "{:.1f}"),
        number("completions/clipped_ratio", "{:.0%}"),
        number("distinct_2", "{:.2f}"),
    ]


def _print_judges(console: Console, judges: Mapping[str, Any]) -> None:
    """Rewards that were not optimised: does the gain hold before others?"""
    if not judges:
        return
    table = Table(title="Judges that were not optimised")
    for name in ("judge", "untouched", "trained", "win rate"):
        table.add_column(name, justify="left" if name == "judge" else "right")
    for name, numbers in judges.items():
        cells = (_spread(numbers[key], 3) for key in ("reference_reward", "reward", "win_rate"))
        table.add_row(visible(name), *cells)
    console.print(table)


def _spread(numbers: Mapping[str, float], digits: int) -> str:
    half = (numbers["high"] - numbers["low"]) / 2
    return f"{numbers['value']:.{digits}f} ±{half:.{digits}f}"


def print_samples(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A few prompts side by side: evenly spread over the set, not chosen."""
    chosen = rows[:: max(1, len(rows) // NUM_SHOWN)][:NUM_SHOWN]
    table = Table(title="Before and after (one random sample each; every so-many-th prompt)", show_lines=True)
    for key in rows[0]:
        table.add_column(key.replace("_", " "), ratio=1)
    for row in chosen:
        cells = [
            visible(v) if isinstance(v, str) else visible(f"{v['text']}\n({v['reward']:.2f})") for v in row.values()
        ]
        table.add_row(*cells)
    console.print(table)


# The completion tokens that a phase works through, by the metric that counts them.
PHASE_TOKENS = {"generate": "num_tokens", "reward": "num_tokens", "reference": "num_tokens/compared"}
PHASE_TOKENS |= {"learn": "num_tokens/learned"}
PHASE_NAMES = {"reward": "score (rewards)", "reference": "anchor and reference log-probs", "learn": "forward, backward"}


def print_phases(
    console: Console, seconds: Mapping[str, float], tokens: Mapping[str, float], evaluation: float = 0.0
) -> None:
    """Where a mean training step's time went, with completion tokens a second; and the evaluations' seconds in all."""
    total = sum(seconds.values())
    if total == 0:
        return
    table = Table(title=f"A mean step: {total:.1f} s, {tokens.get('num_tokens', 0):.0f} tokens sampled")
    for name in ("phase", "seconds", "share", "tokens/s"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, value in sorted(seconds.items(), key=lambda item: -item[1]):
        count = tokens.get(PHASE_TOKENS.get(phase, ""), 0.0)
        rate = f"{count / value:.0f}" if count and value else ""
        table.add_row(PHASE_NAMES.get(phase, phase), f"{value:.2f}", f"{value / total:.0%}", rate)
    if evaluation:
        table.add_row("evaluations, all steps", f"{evaluation:.1f}", "", "")
    console.print(table)
