"""The evaluation that ends a run: `eval.json`, `eval_samples.jsonl`, a table, and the model card.

Every row of the table has the same two measures, against the same M reference samples at temperature 1: the mean
reward, and the win rate with its effective N. The table includes the untouched model at lower temperatures, because
sharpening on its own also raises the reward. `bondlm eval` has more such baselines.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bondlm.data.rows import conversation_text
from bondlm.evaluation.card import write_card
from bondlm.evaluation.describe import describe_rewards, describe_settings
from bondlm.evaluation.pairwise import compared
from bondlm.evaluation.statistics import summarize
from bondlm.evaluation.table import print_samples, print_table
from bondlm.rewards import NamedReward, applies_everywhere
from bondlm.rollout.samples import Samples
from bondlm.runs.ending import best_step, describe_ending
from bondlm.runs.folder import EVAL_FILE, EVAL_SAMPLES_FILE, append_jsonl, plain, run_config, whole, write_whole

BASELINES = {
    "reference, greedy": ("reference", 0.0),
    "reference, T=0.7": ("reference", 0.7),
    "policy, greedy": ("policy", 0.0),
}


def evaluate_run(
    trainer: Any, folder: Path, console: Any, reporter: Any = None, judges: Sequence[NamedReward] = ()
) -> dict[str, Any]:
    """Evaluate the trainer's policy on its held-out prompts and write the run folder's `eval.json`.

    With several data sets this is the one of `main_eval`; each other set has its own folder, `eval-NAME`. `reporter`
    shows progress; a caller that passes one prints the headline itself. `judges` are rewards that were not optimised;
    they score the samples of policy and reference, or compare them.
    """
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {None: trainer.eval_dataset}
    names = sorted(sets, key=lambda name: name == trainer.main_eval)  # the main one last
    found = {name: _measured(trainer, sets[name], reporter, judges, name=name) for name in names}
    if trainer.is_world_process_zero():
        folders = {name: folder if name == trainer.main_eval else folder / f"eval-{name}" for name in names}
        for name, measured in found.items():  # whatever becomes of the judges
            folders[name].mkdir(exist_ok=True)
            write_results(folders[name], measured.result, measured.policy, measured.reference)
        # Only the main process asks judges that rank: the others have no further set in which they wait for it.
        for name, measured in found.items():
            _judge_and_show(trainer, measured, folders[name], console, reporter, judges, name=name)
    return found[names[-1]].result


@dataclass(frozen=True)
class _Measured:
    """The samples of a held-out set, and what `eval.json` says of them."""

    rows: list[dict[str, Any]]
    policy: Samples
    reference: Samples
    result: dict[str, Any]


def _measured(
    trainer: Any, dataset: Any, reporter: Any, judges: Sequence[NamedReward], *, name: str | None
) -> _Measured:
    """Draw and measure; every process must call this."""
    rows, args = list(dataset), trainer.args
    what = "held-out samples at the end" + (f", {name}" if name else "")
    is_drawn = reporter is not None and reporter.reference_drawn
    with _counted(trainer, reporter, what, len(rows) * (1 if is_drawn else 2)):
        policy, reference = trainer.held_out_samples(dataset)
    log_ratio = trainer.log_ratio(policy).double().cpu()
    absolute = [judge for judge in judges if not judge.ranks]
    policy = replace(policy, log_ratio_PM=log_ratio, judges=_judged(trainer, absolute, rows, policy))
    reference = replace(reference, judges=_judged(trainer, absolute, rows, reference))
    with _counted(trainer, reporter, "baselines", len(rows) * len(BASELINES)):
        others = {name: _baseline(trainer, rows, reference, *how) for name, how in BASELINES.items()}
    result = summarize(policy, reference, others)
    result |= {
        "steps": _steps_of_weights(trainer),
        **describe_ending(Path(str(args.output_dir))),
        "objective": describe_settings(args, trainer.objective),
        **describe_rewards(trainer.rewards, trainer.aggregation),
        "model": str(args.output_dir),
        "dataset": _name_of_set(Path(str(args.output_dir)), name),
        "max_completion_length": args.max_completion_length,
        **({"held_out": name} if name else {}),
        "reference": trainer.roles.core.config._name_or_path,
    }
    return _Measured(rows, policy, reference, result)


def _judge_and_show(
    trainer: Any,
    found: _Measured,
    folder: Path,
    console: Any,
    reporter: Any,
    judges: Sequence[NamedReward],
    *,
    name: str | None,
) -> None:
    """Ask the judges that rank, add what they say, and print the table; only on the main process."""
    is_main = name == trainer.main_eval
    if ranking := [judge for judge in judges if judge.ranks]:
        found.result.update(compared(ranking, found.rows, found.policy, found.reference, found.result))
        write_results(folder, found.result, found.policy, found.reference)
    if is_main:
        write_card(folder, found.result)
    if name:
        console.print(f"held-out prompts of {name}:")
    print_samples(console, list(side_by_side(found.policy, found.reference)))
    print_table(console, found.result, headline=reporter is None or not is_main)


def _name_of_set(folder: Path, name: str | None) -> Any:
    """The name of the held-out prompts in the run's settings; None if they were given as rows."""
    given = run_config(folder).get("eval_dataset")
    return given.get(name) if isinstance(given, Mapping) else given


def _steps_of_weights(trainer: Any) -> int:
    """Training steps of the current policy: at the end of a run the best checkpoint may have been loaded."""
    best = best_step(trainer.args, trainer.state)
    return int(trainer.state.global_step if best is None else best)


def _judged(
    trainer: Any, judges: Sequence[NamedReward], rows: Sequence[Mapping[str, Any]], samples: Samples
) -> dict[str, Tensor]:
    if not judges:
        return {}
    return applies_everywhere(trainer.score_completions(rows, samples.completions, judges).by_name)


def _baseline(
    trainer: Any, rows: Sequence[Mapping[str, Any]], reference: Samples, role: str, temperature: float
) -> Samples:
    count = 1 if temperature == 0 else max(1, trainer.args.eval_num_samples // 2)
    samples: Samples = trainer.sample(rows, role, count, temperature=temperature, reference=reference)
    if trainer.args.engine == "vllm" and trainer.args.vllm_server == "external" and temperature != 1:
        # Nothing tells whether a server that is not ours reports log-probabilities of this temperature or of 1.
        samples = replace(samples, logprobs_PM=torch.full_like(samples.logprobs_PM, math.nan))
    return samples


def write_results(folder: Path, result: Mapping[str, Any], policy: Samples, reference: Samples) -> None:
    """Write `eval.json` and `eval_samples.jsonl`; each is written atomically."""
    write_whole(folder / EVAL_FILE, json.dumps(plain(result), indent=2, allow_nan=False) + "\n")
    with whole(folder / EVAL_SAMPLES_FILE) as partial:
        append_jsonl(partial, list(side_by_side(policy, reference)))


@contextmanager
def _counted(trainer: Any, reporter: Any, description: str, total: int) -> Iterator[None]:
    """Show progress over `total` prompts if there is a reporter."""
    if reporter is None:
        yield
        return
    counter = reporter.counting(description, total)
    trainer.engine.on_prompts_done = counter
    try:
        yield
    finally:
        trainer.engine.on_prompts_done = None
        counter.close()


def side_by_side(policy: Samples, reference: Samples, best_of: int = 8) -> Iterator[dict[str, Any]]:
    """Per prompt: one reference sample, the reference's best of 8, one policy sample, each with its reward."""
    best_of = min(best_of, reference.rewards_PM.shape[1])
    best = reference.rewards_PM[:, :best_of].argmax(dim=1).tolist()
    for i, prompt in enumerate(policy.prompts):
        yield {
            "prompt": conversation_text(prompt),
            "reference": _sample(reference, i, 0),
            f"reference_best_of_{best_of}": _sample(reference, i, best[i]),
            "policy": _sample(policy, i, 0),
        }


def _sample(samples: Samples, i: int, j: int) -> dict[str, Any]:
    return {"text": samples.texts[i][j], "reward": float(samples.rewards_PM[i, j])}
