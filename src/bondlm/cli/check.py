"""`bondlm check`: try once everything that a run needs, with one step at learning rate 0, and forecast gains from N."""

import tempfile
from collections.abc import Iterator, Mapping, Sized
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from bondlm.cli.console import make_console, say, say_json
from bondlm.cli.judge_costs import say_costs
from bondlm.errors import RewardError
from bondlm.runs.prompting import adopt_prompting

TIED_PAIRS_WARNED, ALIKE_WARNED, CUT_WARNED = 0.1, 0.2, 0.5
NEIGHBOUR_TOLERANCE = 1e-3  # of a reward, or of 1 if that is more
NEIGHBOUR_ROUNDING = 8  # times the dtype's rounding, since batches of other shapes sum in a different order
PACKAGES = ("bondlm", "torch", "transformers", "accelerate", "peft", "safetensors")
AGREEMENT_PROMPTS, AGREEMENT_SAMPLES = 4, 4
OUTAGE_S = 20.0  # for which a reward server may be down
FAR = 3.0  # a noise scale that differs from the prompts per step by this factor, in either direction


def run(options: dict[str, Any]) -> int:
    """Build the trainer, take one dry step in a scratch folder, and report the results."""
    from bondlm.cli.train import require

    options = dict(options)
    as_json = bool(options.pop("json", False))
    require(options)
    console = make_console(stderr=as_json)
    with tempfile.TemporaryDirectory() as scratch:
        found = _dry_run(options, scratch, console)
    console.print("check passed")
    if as_json:
        say_json({"passed": True, **found})
    return 0


def _dry_run(options: dict[str, Any], scratch: str, console: Console) -> dict[str, Any]:
    """Everything once, said as it comes; returns it for a program."""
    from bondlm.evaluation.forecast import forecast, num_steps, print_cost, print_frontier
    from bondlm.runs.checkpoint import prompts_per_step
    from bondlm.training.noise import SCALE, TRACE

    with console.status("loading PyTorch, the model, data and rewards"):
        args, trainer, checkpoint = _prepared(options, scratch, console)
    versions = {name: version(name) for name in PACKAGES}
    say(console, ", ".join(map(" ".join, versions.items())))
    number = len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else "streamed"
    console.print(f"model, tokenizer and rewards loaded; {number} training prompts")
    with console.status("one dry step"):
        trainer.train()
    if checkpoint is not None:
        _compare(trainer, Path(checkpoint), allowed=bool(options.get("allow_config_change")))
        say(console, f"train continues from {checkpoint}")
    logs = next(row for row in trainer.state.log_history if "loss" in row)
    found: dict[str, Any] = {"versions": versions, "num_prompts": number, "metrics": logs}
    if trainer.rewards:
        _check_neighbours(trainer)
        with console.status("answers of the untouched model"):
            found |= forecast(print_frontier(console, trainer))
        found["agreement"] = _say_agreement(trainer, console)
    trainer.save_model()
    size = sum(path.stat().st_size for path in Path(scratch).rglob("*") if path.is_file())
    for name in sorted(logs):
        if name.split("/")[0] in ("reward", "rewards", "completions", "time", "step_time", "bond"):
            say(console, f"  {name:32} {logs[name]:.4g}")
    print_cost(console, trainer, args, logs["step_time"])
    steps = num_steps(args, trainer.train_dataset)
    found |= {"num_steps": steps, "seconds": steps * logs["step_time"]}
    prompts, advice = prompts_per_step(args)["prompts_per_step"], ""
    if TRACE in logs:
        found["noise_scale"] = logs.get(SCALE)
        advice = batch_advice(logs.get(SCALE), prompts)
    elif args.gradient_accumulation_steps == 1:
        advice = f"prompts per step: {prompts}; advice on their number needs gradient_accumulation_steps of 2 or more"
    if advice:
        say(console, advice)
    space = trainer.anchor_callback.space(args, args.save_total_limit) | {"model_bytes": size}
    found["disk"] = _check_disk(Path(str(options.get("output_dir") or "runs/bond")), space, console)
    found["warnings"] = list(_warnings(args, logs, steps))
    for text in found["warnings"]:
        say(console, f"warning: {text}")
    say_costs(console, trainer.rewards)
    return found


def _compare(trainer: Any, checkpoint: Path, *, allowed: bool) -> None:
    """Refuse what `train` refuses after loading model and data."""
    from bondlm.models.deepspeed import require_same_sharding
    from bondlm.training.settings import compare_settings

    require_same_sharding(checkpoint, trainer.args)
    compare_settings(checkpoint, None, trainer.roles.adapter, allowed=allowed)
    trainer.anchor_callback.compare_data(checkpoint)


def _prepared(options: dict[str, Any], scratch: str, console: Console) -> tuple[Any, Any, str | None]:
    """The settings as they are, a trainer of one dry step with what they name, and where `train` would go on."""
    from bondlm.cli.train import build_trainer, load_judges, resume_of, training_arguments
    from bondlm.config import require_metric_of
    from bondlm.data.held_out import main_set
    from bondlm.data.sources import named_sets
    from bondlm.training.data import check_streaming

    dry = {
        "max_steps": 1,
        "num_train_epochs": 3.0,
        "learning_rate": 0.0,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    dry |= {"eval_strategy": "no", "eval_steps": None, "eval_on_start": False, "target_n": None, "kl_budget": None}
    dry |= {"load_best_model_at_end": False, "metric_for_best_model": None, "greater_is_better": None}
    dry |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0}
    dry |= {"push_to_hub": False, "report_to": "none"}  # a dry run uploads and reports nothing
    args = training_arguments(options | {"output_dir": scratch})
    dry["reward_outage_s"] = min(args.reward_outage_s, OUTAGE_S)  # a server that is down is a result of the check
    if args.streaming:
        check_streaming(args)
    held_out = options.get("eval_dataset")
    main_set(args, held_out)
    _check_evaluations(args, options)
    checkpoint = resume_of(options, console)
    if checkpoint is not None:  # its prompts are to be the same
        adopt_prompting(Path(checkpoint).resolve().parent, Path(scratch))
    trainer = build_trainer(options | dry | {"output_dir": scratch})
    require_metric_of(named_sets(held_out), args.metric_for_best_model, [each.name for each in trainer.rewards])
    trainer.noise.every = 1  # also in the dry step
    load_judges(options, trainer)
    return args, trainer, checkpoint


def batch_advice(scale: float | None, prompts: int) -> str:
    """Advice on the number of prompts per step from the gradient's noise scale at the start.

    The number of steps to a given loss is proportional to 1 + scale / prompts (McCandlish et al. 2018, arXiv
    1812.06162).
    """
    if scale is None:
        return f"prompts per step: {prompts}; noise hides the gradient in one step of them, more would probably help"
    found = f"prompts per step: {prompts}; the gradient's noise scale in one step at the start is {scale:.0f} prompts"
    if scale > FAR * prompts:
        return f"{found}: twice the prompts would save more than a third of the steps"
    if scale < prompts / FAR:
        return f"{found}: fewer would do at first (it grows as the run goes on)"
    return f"{found}: a good size"


def _warnings(args: Any, logs: Mapping[str, float], steps: int) -> Iterator[str]:
    from bondlm.training.notices import anchor_warning, warmup_warning

    if (text := warmup_warning(args, steps)) is not None:
        yield text
    if (text := anchor_warning(args, steps)) is not None:
        yield text
    if (text := _ties_warning(logs)) is not None:
        yield text
    if (cut := logs["completions/clipped_ratio"]) > CUT_WARNED:
        ways = ["raise max_completion_length", "use a reward that favours an end"]
        if args.missing_eos != "worst":
            ways.append(f"rank them last (missing_eos: worst; it is {args.missing_eos})")
        yield f"{cut:.0%} of the answers were cut off: {', or '.join(ways)}"


def _ties_warning(logs: Mapping[str, float]) -> str | None:
    """Warn of prompts whose rewards teach too little; if all samples are learned from, single ties do no harm."""
    if (alike := logs.get("bond/frac_no_signal")) is not None:
        text = "of the prompts have the same reward for all of their samples, which then teaches nothing"
        return f"{alike:.0%} {text} (bond/frac_no_signal)" if alike > ALIKE_WARNED else None
    tied = logs["bond/frac_tied"]
    text = "of the pairs of a prompt's samples have equal rewards, and BOND learns from order (bond/frac_tied)"
    return f"{tied:.0%} {text}" if tied > TIED_PAIRS_WARNED else None


def _check_evaluations(args: Any, options: dict[str, Any]) -> None:
    """Check settings of evaluations, which the dry step does not make."""
    from bondlm.config import require_metric_of
    from bondlm.data.scored import check_inputs
    from bondlm.data.sources import named_sets

    held_out = options.get("eval_dataset")
    has = {"has_prompts": False, "has_held_out": held_out is not None}
    check_inputs(args, None, [], "", options.get("reward_funcs"), **has)
    require_metric_of(named_sets(held_out), args.metric_for_best_model)


def _check_neighbours(trainer: Any) -> None:
    """A reward must not depend on the other rows of its batch (as with a padding bug), unless it ranks."""
    absolute = [reward for reward in trainer.rewards if not reward.ranks]
    if not absolute:
        return
    rows = list(islice(trainer.train_dataset, 2))
    together = trainer.sample(rows, "policy", 2)
    for i, row in enumerate(rows):
        alone = trainer.score_completions([row], [together.completions[i][:1]])
        for reward in absolute:
            name = reward.name
            value, in_batch = (float(samples.by_name[name][j, 0]) for samples, j in ((alone, 0), (together, i)))
            allowed = _rounding(reward) * max(1.0, abs(value))
            if abs(value - in_batch) > allowed:  # False for NaN, where the reward does not apply
                raise RewardError(
                    f"row {i}: the reward {name!r} is {value} when scored alone and {in_batch} in a batch, and at most "
                    f"{allowed:.2g} of that is rounding: it depends on the rest of the batch (often a padding bug), so "
                    "its order is meaningless. Score row by row (batch_size=1 of a model), or mask the padding; see "
                    "docs/rewards.md"
                )


def _rounding(reward: Any) -> float:
    """How much a reward may change with the rest of the batch, relative to its value or to 1, whichever is larger.

    It depends on the dtype of the reward's model, which is unknown for functions and servers.
    """
    import torch

    dtype = getattr(getattr(reward.function, "model", None), "dtype", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return NEIGHBOUR_TOLERANCE
    return max(NEIGHBOUR_TOLERANCE, NEIGHBOUR_ROUNDING * torch.finfo(dtype).eps)


def _say_agreement(trainer: Any, console: Console) -> dict[str, float]:
    from bondlm.evaluation.pairwise import why_unsteady

    found = _agreement(trainer)
    for name, share in found.items():
        say(console, f"{name} ranks {share:.0%} of the pairs of answers alike when they are in the opposite order")
        if (why := why_unsteady(share)) is not None:
            say(console, f"warning: {name} {why}")
    return found


def _agreement(trainer: Any) -> dict[str, float]:
    """Share of pairs of different answers that a ranking reward puts in the same order when asked twice.

    A judge, which shuffles the answers, is asked once about them in the given order; otherwise a preference for the
    first answer would show only by chance.
    """
    from bondlm.evaluation.pairwise import in_given_order
    from bondlm.rollout.seeds import Seeds

    names = [reward.name for reward in trainer.rewards if reward.ranks]
    if not names:
        return {}
    rows = list(islice(trainer.train_dataset, AGREEMENT_PROMPTS))
    seeds = Seeds.of_evaluation(trainer.args.seed, 1.0)
    drawn = trainer.step.draw(rows, {"policy": AGREEMENT_SAMPLES}, seeds, range(len(rows)))
    step = replace(trainer.step, rewards=[in_given_order(reward) for reward in trainer.rewards])
    first, second = (step.score(rows, answers) for answers in (drawn, [given[::-1] for given in drawn]))
    found = {}
    for name in names:
        one_PM, other_PM = first.by_name[name], second.by_name[name].flip(1)
        gaps = [(values_PM[:, :, None] - values_PM[:, None, :]).sign() for values_PM in (one_PM, other_PM)]
        is_pair = (gaps[0] != 0) | (gaps[1] != 0)
        if is_pair.any():
            found[name] = float((gaps[0] == gaps[1])[is_pair].double().mean())
    return found


def _check_disk(folder: Path, space: Mapping[str, Any], console: Console) -> dict[str, int]:
    from bondlm.runs.checkpoint import require_space

    free, needed = require_space(folder, **space)
    say(console, f"disk: {free / 2**30:.1f} GiB free, about {needed / 2**30:.2f} GiB needed")
    return {"free_bytes": free, "needed_bytes": needed}
