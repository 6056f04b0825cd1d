"""Costs of judges: estimated before a run from a few real questions, and counted after it."""

from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

from rich.console import Console

from bondlm.cli.console import say
from bondlm.runs.folder import is_main_process

PROBED = 8  # prompts for which judges are asked before the run
TAGS = 36  # characters around an answer in a question


@contextmanager
def judge_costs(console: Console, trainer: Any, others: Sequence[Any] = ()) -> Iterator[None]:
    """Print what the judges of a run will cost when training begins, and what they have cost however it ends.

    `others` are the judges of the last evaluation, whose cost depends on its samples, so it is only counted.
    """
    from transformers import TrainerCallback

    class Forecast(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            for name, (calls, tokens) in expected_costs(trainer, state.global_step, state.max_steps).items():
                say(console, f"judge {name}: this run needs about {calls} calls and {tokens} tokens{_where(args)}")

    if not judges_of([*trainer.rewards, *others]):
        yield
        return
    trainer.add_callback(Forecast())
    try:
        yield
    finally:
        say_costs(console, [*trainer.rewards, *others], _where(trainer.args))


@contextmanager
def costs_said(console: Console, rewards: Sequence[Any]) -> Iterator[None]:
    """Print what judges have cost however the work ends."""
    try:
        yield
    finally:
        say_costs(console, rewards)


def say_costs(console: Console, rewards: Sequence[Any], where: str = "") -> None:
    """Print one line per judge with its calls and tokens so far."""
    for name, judge in judges_of(rewards).items() if is_main_process() else ():
        used = judge.usage
        how = "" if used.is_counted else " (a guess: the server does not count)"
        more = f"; {used.cached} more answers were on disk" if used.cached else ""
        say(console, f"judge {name}: {used.calls} calls, {used.tokens} tokens{how}{where}{more}")


def judges_of(rewards: Sequence[Any]) -> dict[str, Any]:
    """The judges among rewards, by name."""
    from bondlm.rewards import JudgeReward

    return {reward.name: reward.function for reward in rewards if isinstance(reward.function, JudgeReward)}


def expected_costs(trainer: Any, first_step: int, last_step: int) -> dict[str, tuple[int, int]]:
    """Expected calls and tokens of each judge in this process, from real questions about a few training prompts.

    They include the cost of these questions. The numbers of prompts per step and evaluation are exact; answers are
    assumed to keep their current length.
    """
    if not judges_of(trainer.rewards):
        return {}
    rows = list(islice(trainer.train_dataset, PROBED))
    count, total = len(rows), trainer.objective.plan.total
    samples = trainer.sample(rows, "policy", total, drop=True)  # prompts without a ranking are counted by the run
    length = sum(len(text) for texts in samples.texts for text in texts) / (count * total)
    prompts = _prompts(trainer, last_step) - _prompts(trainer, first_step)
    found = {}
    for name, judge in judges_of(trainer.rewards).items():
        used = judge.usage
        asked = used.calls + used.cached
        if not asked:  # all samples of each prompt are equal
            continue
        each, share = used.characters / asked, asked / count  # share: rounds, and prompts with only one answer
        evaluations = _evaluations(trainer, first_step, last_step, is_kept=judge.keeps_answers)
        sizes = [(prompts * share, used.answers / asked), *((n * judge.rounds, size) for n, size in evaluations)]
        characters = sum(calls * (each + (size - sizes[0][1]) * (length + TAGS)) for calls, size in sizes)
        tokens = used.expected_tokens(characters, sum(calls * size for calls, size in sizes))
        found[name] = (used.calls + round(sum(calls for calls, _ in sizes)), used.tokens + tokens)
    return found


def _prompts(trainer: Any, step: int) -> float:
    """Training prompts of this process up to a step; the last step of an epoch may have fewer than others."""
    args = trainer.args
    each = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if not isinstance(trainer.train_dataset, Sized):  # a stream is endless and has one process
        return float(step * each)
    rows = len(trainer.train_dataset)
    whole, rest = divmod(step, -(-rows // each))
    return float(whole * rows + min(rows, rest * each)) / float(args.world_size)


def _evaluations(trainer: Any, first_step: int, last_step: int, *, is_kept: bool) -> list[tuple[int, int]]:
    """(prompts, answers per question) of all questions in evaluations, including the last one.

    An evaluation after the last step has the same samples as the final one, and cached answers are not paid for twice.
    """
    args = trainer.args
    if trainer.eval_dataset is None:
        return []
    datasets = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    prompts = sum(-(-len(dataset) // args.world_size) for dataset in datasets)  # the main process's share, the largest
    references = args.eval_num_reference_samples
    during = _evaluated_steps(trainer, first_step, last_step)
    times = bool(args.eval_on_start) + len(during) - (is_kept and last_step in during)
    of_baselines = (1, max(1, args.eval_num_samples // 2), 1)  # bondlm.evaluation.run
    sizes = [references, *[references + args.eval_num_samples] * (times + 1)]
    return [(prompts, size) for size in [*sizes, *(references + count for count in of_baselines)]]


def _evaluated_steps(trainer: Any, first_step: int, last_step: int) -> list[int]:
    """The steps after `first_step` that an evaluation follows; if there are any, the last one is among them."""
    args = trainer.args
    if args.eval_strategy == "steps":
        every, least = int(trainer.state.eval_steps), args.eval_delay  # in the state a share is a number of steps
    elif args.eval_strategy == "epoch" and isinstance(trainer.train_dataset, Sized):
        each = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        every = -(-len(trainer.train_dataset) // each)
        least = args.eval_delay * every  # a delay in epochs
    else:
        return []
    return [step for step in {*range(every, last_step, every), last_step} if step > first_step and step >= least]


def _where(args: Any) -> str:
    return " of this process" if args.world_size > 1 else ""
