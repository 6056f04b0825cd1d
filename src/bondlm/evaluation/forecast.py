"""The forecast of `bondlm check` before a run starts: its time, its memory, and the gain from larger N."""

import math
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from bondlm.bestofn import Estimate, best_of_n_win_rates, bootstrap_mean, expected_best_of_n, kl_bound
from bondlm.bestofn.quantiles import tied_share
from bondlm.evaluation.table import narrow_table

PROMPTS, SAMPLES = 16, 9  # one sample more than the largest N, as the opponent


def print_frontier(console: Console, trainer: Any) -> Tensor:
    """Draw from the untouched model, show the gain of its Best-of-N, and return the rewards (P, M).

    Raises:
        ConfigError, RewardError: the reward fails.
    """
    dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    if isinstance(dataset, dict):
        dataset = dataset[trainer.main_eval]
    rows = list(islice(dataset, PROMPTS))
    began = time.perf_counter()
    samples = trainer.sample(rows, "reference", SAMPLES)
    seconds = (time.perf_counter() - began) / samples.rewards_PM.numel()
    title = f"Best-of-N of the untouched model: {len(rows)} prompts, {SAMPLES} answers each"
    table = narrow_table(title, "N", "win rate", "reward", "KL at most", left=0)
    for row in frontier(samples.rewards_PM):
        table.add_row(str(row.n), _spread(row.win_rate), _spread(row.reward), f"{row.kl_at_most:.2f}")
    console.print(table)
    console.print(
        f"{tie_rate(samples.rewards_PM):.0%} of the pairs of a prompt's answers have equal rewards; "
        f"{float((1 - samples.finished_PM).mean()):.0%} of the answers were cut off.",
        soft_wrap=True,
    )
    _print_evaluation(console, trainer, seconds)
    return samples.rewards_PM


def forecast(rewards_PM: Tensor) -> dict[str, Any]:
    """The table of `print_frontier` as data, for programs."""
    rows = [
        {"n": row.n, "win_rate": row.win_rate._asdict(), "reward": row.reward._asdict(), "kl_at_most": row.kl_at_most}
        for row in frontier(rewards_PM)
    ]
    return {"best_of_n": rows, "tied": tie_rate(rewards_PM)}


class Worth(NamedTuple):
    """The gain of Best-of-n of a model, and an upper bound on its KL, in nats."""

    n: int
    win_rate: Estimate
    reward: Estimate
    kl_at_most: float


def frontier(rewards_PM: Tensor) -> Iterator[Worth]:
    """Win rate, reward and KL of Best-of-n of the model that drew the samples, n a power of two below M."""
    win_rates_PN = torch.as_tensor(best_of_n_win_rates(rewards_PM))
    n = 1
    while n < rewards_PM.shape[1]:
        of_win = bootstrap_mean(win_rates_PN[:, n - 1])
        of_reward = bootstrap_mean(expected_best_of_n(rewards_PM, n))
        yield Worth(n, of_win, of_reward, kl_bound(n))
        n *= 2


def tie_rate(rewards_PM: Tensor) -> float:
    """Share of pairs of samples of the same prompt whose rewards are equal."""
    return float(tied_share(rewards_PM).mean())


def print_cost(console: Console, trainer: Any, args: Any, seconds: float) -> None:
    """Print the time of all steps of the run that `args` describe, at `seconds` per step, and the memory used."""
    steps = num_steps(args, trainer.train_dataset)
    peak = _peak_memory()
    console.print(
        f"A step takes about {_duration(seconds)} (the first is the slowest), {steps} steps about "
        f"{_duration(steps * seconds)}, evaluations not counted." + ("" if peak is None else f" Memory: {peak}."),
        soft_wrap=True,
    )


def num_steps(args: Any, prompts: Any) -> int:
    """Optimizer steps of a run over `prompts`, as `transformers.Trainer` counts them; a stream needs `max_steps`."""
    if args.max_steps >= 0:
        return int(args.max_steps)
    batches = len(prompts) / (args.per_device_train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))


def _print_evaluation(console: Console, trainer: Any, seconds: float) -> None:
    dataset = trainer.eval_dataset
    if dataset is None:
        return
    num_prompts = sum(map(len, dataset.values())) if isinstance(dataset, dict) else len(dataset)
    each, once = trainer.args.eval_num_samples, trainer.args.eval_num_reference_samples
    first, later = _duration(num_prompts * once * seconds), _duration(num_prompts * each * seconds)
    console.print(
        f"An evaluation draws {num_prompts} x {each} answers; the first one also draws {num_prompts} x {once} from the "
        f"untouched model: about {later} and {first}.",
        soft_wrap=True,
    )


def _peak_memory() -> str | None:
    """The peak memory of this process; None if it is not measured."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the card"
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def _spread(estimate: Any) -> str:
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
