"""The last three lines of `bondlm train`: the result, its cost, and what to do next."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bondlm.cli.console import clock_text
from bondlm.runs.ending import read_ending
from bondlm.runs.worth import at_least, below


def ending(folder: Path, step: int, reporter: Any, result: Mapping[str, Any] | None) -> Iterator[str]:
    """Three lines; `result` is that of the last evaluation, None if there was nothing to evaluate on."""
    known = read_ending(folder)
    goal = f"; stopped there: {known.reason}" if known is not None and known.reason else ""
    if result is None:
        yield f"reached: step {step}{goal}; without an eval_dataset nothing was measured"
    elif (lost := below(result, "the untouched model")) is not None:
        yield f"reached: one sample is {lost}{goal}"
    else:
        worth, wins = result["effective_n"]["text"], result["win_rate"]["value"]
        yield f"reached: one sample = Best-of-{worth} of the untouched model, win rate {wins:.2f}{goal}"
    yield f"cost: {_cost(step, reporter, result)}"
    name = shlex.quote(str(folder))
    if result is None:
        yield f"next: bondlm eval --model {name} --dataset HELDOUT, or bondlm sample --model {name} --prompt TEXT"
        return
    page = folder / "report.html"
    look = f"open {page}, or " if page.is_file() else ""
    yield f"next: {look}bondlm sample --model {name} --prompt TEXT"


def _cost(step: int, reporter: Any, result: Mapping[str, Any] | None) -> str:
    taken = step - reporter.first_step
    steps = f"{step} steps" if taken == step else f"{step} steps ({taken} in this session)"
    spent = f"{steps} in {clock_text(reporter.training_seconds)}"
    if result is None:
        return spent
    from bondlm.evaluation.table import spread

    needed = f"{at_least(result)}{result['kl_of_best_of_n']:.2f}"
    needs = "" if below(result) else f", where Best-of-N itself needs {needed}"
    return f"KL {spread(result['kl'], 2)} nats{needs}; {spent}"
