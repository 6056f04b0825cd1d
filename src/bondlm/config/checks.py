"""Checks on combinations of settings; each problem is one sentence that shows the value."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from importlib.util import find_spec
from numbers import Integral, Real
from typing import Any, get_origin

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from bondlm.config.optimization import check_optimization
from bondlm.config.settings import Setting
from bondlm.errors import ConfigError, as_list
from bondlm.migration import UNSAFE_CODE
from bondlm.migration.names import nearest
from bondlm.objectives.make import OBJECTIVES, anchor_may_move, make_objective, users

_log = logging.getLogger(__name__)

# What an evaluation measures, and whether more is better; the ends of each interval are under _low and _high.
MEASURES = {"reward": True, "win_rate": True, "effective_n": True, "kl": False}
ENDS = ("", "_low", "_high")
OF_QUANTILES = ("log_quantile", "correction", "quantile", "quantile_learning_rate")  # which the backward KL has
MEASURING = ("reduce_lr_on_plateau", "greedy")  # schedules that follow `metric_for_best_model`
WITHOUT_WARMUP = ("constant", *MEASURING)
OTHERS = (
    *(f"reference_reward{end}" for end in ENDS),
    "entropy",
    *(f"completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio", "frac_empty")),
)
GOAL = re.compile(r"(?:^|_)(rewards/(.+)/(win_rate|effective_n))(?:_low|_high)?$")  # one of several rewards


def refuse_null(c: Any, defaults: Mapping[str, Any]) -> None:
    """Refuse None for a setting that must have a value.

    Raises:
        ConfigError: one is.
    """
    for name, default in defaults.items():
        if default not in (None, "") and getattr(c, name, default) is None:  # HfArgumentParser makes "" None
            raise ConfigError(f"{name}=None: it must have a value; leave it out for the default ({default!r})")


def settle_best_model(c: Any) -> None:
    """Set `greater_is_better` from the measure, unless the user has set it."""
    measure = _measure(c.metric_for_best_model)
    if measure is not None and c.greater_is_better is None:
        c.greater_is_better = MEASURES.get(measure.rpartition("/")[2])


def settle_direction(c: Any) -> None:
    """Tell a schedule that follows a metric whether higher is better (its own default: lower)."""
    if c.lr_scheduler_type in MEASURING and c.greater_is_better is not None:
        c.lr_scheduler_kwargs = {"mode": "max" if c.greater_is_better else "min"} | (c.lr_scheduler_kwargs or {})


@contextmanager
def refused_plainly() -> Iterator[None]:
    """Turn errors that transformers raises about settings into a ConfigError.

    Raises:
        ConfigError: a setting is refused.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"a setting was refused: {error}") from error


def check_inherited(c: Any) -> None:
    """Check the settings inherited from `TrainingArguments`, after its own `__post_init__`.

    Raises:
        ConfigError: a logger does not exist or is not installed, or a run cannot use a value.
    """
    require_loggers(list(c.report_to or ()))
    check_accelerator(c.accelerator_config)
    settle_direction(c)
    check_best_checkpoint(c)
    check_init_kwargs(c.model_init_kwargs)
    check_optimization(c)
    if c.max_steps >= 0 and "num_train_epochs" in c.given:
        _log.warning(
            "num_train_epochs=%g is ignored: max_steps=%d sets the length of the run; remove one of the two",
            *(c.num_train_epochs, c.max_steps),
        )


def check_accelerator(settings: Any) -> None:
    """Refuse ways of distributing the data that steps and resumes do not support.

    Raises:
        ConfigError: one of them is asked for.
    """
    refused = {
        "dispatch_batches": (True, "sends tensors, but prompts are text"),
        "split_batches": (True, "makes the number of prompts per step differ from per_device_train_batch_size"),
        "even_batches": (False, "gives the processes different numbers of prompts"),
        "use_seedable_sampler": (False, "shuffles a resumed run differently"),
    }
    for name, (value, why) in refused.items():
        if getattr(settings, name, None) is value:
            raise ConfigError(f"accelerator_config: {name}={str(value).lower()} {why}; remove it")


def check_best_checkpoint(args: Any) -> None:
    """Refuse `load_best_model_at_end` where the best evaluation may be of a step that has no checkpoint.

    Trainer asks only for a multiple, and then brings back the weights of an earlier, worse evaluation.

    Raises:
        ConfigError: there are more evaluations than checkpoints.
    """
    if args.load_best_model_at_end and args.save_strategy == "steps" and args.save_steps != args.eval_steps:
        raise ConfigError(
            f"load_best_model_at_end=True: the best evaluation may be of a step without a checkpoint, as eval_steps="
            f"{args.eval_steps:g} and save_steps={args.save_steps:g}. Set both to the same number, or "
            "save_strategy='best'"
        )


def check_init_kwargs(keywords: Any) -> None:
    """Refuse what a model cannot be loaded with.

    Raises:
        ConfigError: they are no keyword arguments, or would run code that comes with a model.
    """
    if keywords is not None and not isinstance(keywords, Mapping):
        raise ConfigError(f"model_init_kwargs={keywords!r}: give keyword arguments of from_pretrained, name: value")
    if (keywords or {}).get("trust_remote_code"):
        raise ConfigError(f"model_init_kwargs={keywords!r}: trust_remote_code {UNSAFE_CODE}")


def _measure(metric: Any) -> str | None:
    """The measure that a metric's name refers to; with several data sets, the name of one precedes it."""
    names = {name + end: name for name in MEASURES for end in ENDS} | {name: name for name in OTHERS}
    text = str(metric).removeprefix("eval_")
    if (goal := GOAL.search(text)) is not None:
        return goal[1]
    found = [name for name in names if text == name or text.endswith(f"_{name}")]
    return names[max(found, key=len)] if found else None


def require_metric_of(names: Iterable[str] | None, metric: str | None, rewards: Sequence[str] | None = None) -> None:
    """Check that an evaluation logs `metric_for_best_model`.

    Args:
        names: those of the held-out data sets, if they are named.
        metric: the setting.
        rewards: names of the rewards, once these are known: several are also measured one by one.

    Raises:
        ConfigError: no evaluation logs it, so that the run would fail after its first one.
    """
    if metric is None:
        return
    text, measure = metric.removeprefix("eval_"), str(_measure(metric))
    starts = ["", *(f"{name}_" for name in names or ())]  # the leading set is also logged without its name
    if not any(text.startswith(start + measure) for start in starts):
        choices = ", ".join(f"eval_{start}{measure}" for start in starts)
        raise ConfigError(f"metric_for_best_model={metric!r}: an evaluation logs no such metric, choose one {choices}")
    goal, has_goals = GOAL.search(text), rewards is None or len(rewards) > 1
    if goal is not None and not (has_goals and (rewards is None or goal[2] in rewards)):
        lone = f"with a single reward it is {goal[3]} itself"
        why = f"the rewards are called {', '.join(rewards or ())}" if has_goals else lone
        raise ConfigError(f"metric_for_best_model={metric!r}: {why}; an evaluation logs no such metric")


def require_loggers(names: Sequence[str]) -> None:
    """Check that the loggers of a run exist and are installed.

    Raises:
        ConfigError: there is no such logger, or its package is not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            hint = as_list(name) or nearest(name, INTEGRATION_TO_CALLBACK)
            raise ConfigError(
                f"report_to={name!r}: no such logger{hint}, choose one of {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if name != "flyte" and name not in get_available_reporting_integrations():  # type: ignore[no-untyped-call]
            raise ConfigError(
                f"report_to={name!r}: its package is not installed. pip install {PACKAGES.get(name, name)}, or remove "
                "it: BONDTrainer always writes metrics.jsonl"
            )


PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "tensorboard": "tensorboard"}


def problems(c: Any, settings: Mapping[str, Setting], defaults: Mapping[str, Any]) -> list[str]:
    """Every contradiction, each as one sentence that shows the value and what is allowed."""
    found = [*_outside_of_range(c, settings, defaults), *_unused(c, settings, defaults), *_contradictions(c)]
    if found:
        return found
    try:
        plan = make_objective(c.objective, vars(c)).plan
    except ConfigError as error:
        return [str(error)]
    if c.gamma_ref and (plan.policy == 0 or not anchor_may_move(c.objective)):
        why = "its KL to the reference has weight 1" if plan.policy else "it draws no samples of the policy"
        found.append(f"gamma_ref={c.gamma_ref!r}: objective={c.objective!r} does not use it ({why}), remove it")
    elif c.gamma_ref and (c.anchor == "fixed" or (c.anchor == "ema" and c.eta == 0)):
        still = "anchor='fixed'" if c.anchor == "fixed" else f"an anchor with eta={c.eta!r}"
        found.append(
            f"gamma_ref={c.gamma_ref!r}: {still} is the reference itself, and the objective already has a KL "
            "to it; remove gamma_ref, or let the anchor move"
        )
    found.extend(_of_no_weight(c, defaults))
    if c.missing_eos == "worst" and plan.total == 1:
        found.append(
            f"missing_eos='worst': objective={c.objective!r} draws one sample per prompt, so there is no other to "
            "rank it below; use 'drop', or a reward that looks at `truncated`"
        )
    return found


def _outside_of_range(c: Any, settings: Mapping[str, Setting], defaults: Mapping[str, Any]) -> Iterator[str]:
    for name, setting in settings.items():
        value = getattr(c, name)
        if (problem := other_kind(name, value, setting.kinds)) is not None:
            yield problem
            continue
        if setting.rule is None or (value is None and defaults.get(name) is None):
            continue
        if (problem := setting.rule.problem(name, value)) is not None:
            yield problem


def other_kind(name: str, value: Any, kinds: frozenset[type]) -> str | None:
    """The problem with a value of the wrong type, such as text for a number; None if there is none."""
    kinds -= {type(None)}
    is_switch = isinstance(value, bool)
    if value is None or not kinds:
        return None
    if kinds <= {int, float} and (is_switch or not isinstance(value, Real)):
        return f"{name}={value!r}: must be a number"
    if kinds == {int} and not isinstance(value, Integral):
        return f"{name}={value!r}: must be a whole number"
    if kinds == {bool} and not (is_switch or value in (0, 1)):
        return f"{name}={value!r}: must be true or false"
    if all(get_origin(kind) is list for kind in kinds) and not isinstance(value, list | tuple):
        return f"{name}={value!r}: must be a list, such as [a, b]"
    is_json = isinstance(value, str) and value.startswith("{")
    if name.endswith("_kwargs") and not (is_json or isinstance(value, Mapping)):
        return f"{name}={value!r}: must be names and values, such as {{name: value}}"
    return None


def _unused(c: Any, settings: Mapping[str, Setting], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Settings that differ from their defaults although nothing in this run uses them."""
    for name, setting in settings.items():
        if getattr(c, name) == defaults.get(name, MISSING):
            continue
        other, _ = setting.needs or ("objective", c.objective)
        owners = users(name) or users(other)
        if owners and c.objective in OBJECTIVES and c.objective not in owners:
            yield _not_used(c, name, "objective", owners)
        elif (lacking := _lacking(c, name, settings)) is not None:
            yield _not_used(c, name, lacking[0], (lacking[1],))


def _lacking(c: Any, name: str, settings: Mapping[str, Setting]) -> tuple[str, str] | None:
    """The setting and value that this one needs and the run lacks, following what those need in turn."""
    while (needs := settings[name].needs) is not None:
        if getattr(c, needs[0]) != needs[1]:
            return needs
        name = needs[0]
    return None


def _not_used(c: Any, name: str, other: str, values: tuple[str, ...]) -> str:
    do = f"{', '.join(map(repr, values))} {'do' if len(values) > 1 else 'does'}"
    if name == "beta" and c.objective in users("beta_rl"):
        do += "; the KL coefficient that TRL calls beta is beta_rl"
    return f"{name}={getattr(c, name)!r}: {other}={getattr(c, other)!r} does not use it ({do}), remove it"


def _of_no_weight(c: Any, defaults: Mapping[str, Any]) -> Iterator[str]:
    """At beta = 0 only the forward KL to the best of n samples is left; at beta_rl = 0 nothing pulls to the anchor."""
    if c.objective in users("beta_rl") and c.beta_rl == 0 and c.anchor != "fixed":
        yield f"anchor={c.anchor!r}: at beta_rl={c.beta_rl!r} there is no KL to the anchor; remove it, or raise beta_rl"
    if c.objective not in users("beta") or c.beta != 0:
        return
    idle = [name for name in OF_QUANTILES if getattr(c, name) != defaults[name]]
    if c.num_anchor_samples not in (None, c.n):
        idle.append("num_anchor_samples")
    for name in idle:
        uses = f"draws n={c.n} of them" if name == "num_anchor_samples" else "does not use it"
        yield f"{name}={getattr(c, name)!r}: at beta={c.beta!r} only the forward KL is left, which {uses}; remove it"


def _contradictions(c: Any) -> Iterator[str]:
    """Contradictions between two settings, or between a setting and this machine."""
    if c.output_dir == "":
        yield "output_dir='': name a folder (it is created if it does not exist)"
    if c.deepspeed and find_spec("deepspeed") is None:
        yield f"deepspeed={c.deepspeed!r}: its package is not installed. pip install 'bondlm[deepspeed]'"
    if c.anchor != "fixed" and not anchor_may_move(c.objective):
        yield (
            f"anchor={c.anchor!r}: objective={c.objective!r} has no moving anchor, its KL is to the model it started "
            "from; remove the setting"
        )
    if c.target_n is not None and c.target_n > c.eval_num_reference_samples:
        yield (
            f"target_n={c.target_n}: must be at most eval_num_reference_samples={c.eval_num_reference_samples}, which "
            "cannot show more"
        )
    if c.average_weights and keeps_best(c):
        asks = "load_best_model_at_end" if c.load_best_model_at_end else "save_strategy='best'"
        yield (
            f"average_weights={c.average_weights}: {asks} keeps the weights of one step, but the evaluation that "
            f"chose them measured the average; set average_weights=0, or remove {asks}"
        )
    for name in ("target_n", "kl_budget"):
        if getattr(c, name) is not None and c.eval_strategy == "no":
            yield (
                f"{name}={getattr(c, name)}: only an evaluation uses it, and with eval_strategy='no' training "
                "runs none: set eval_strategy='steps' with eval_steps, and an eval_dataset"
            )
    yield from _of_best_model(c)
    yield from _of_server(c)
    if c.eval_steps is not None and c.eval_strategy == "no":
        yield f"eval_steps={c.eval_steps}: with eval_strategy='no' there is no evaluation; set eval_strategy='steps'"
    warmup = c.warmup_steps
    if c.lr_scheduler_type in WITHOUT_WARMUP and warmup not in (0, 100):  # 100 is the default
        yield f"warmup_steps={warmup}: lr_scheduler_type={c.lr_scheduler_type!r} has no warm-up, use another schedule"


def _of_server(c: Any) -> Iterator[str]:
    """Settings of the transformers engine's decoding, which a server knows nothing of."""
    options = {"max_rows": (None, "--max-num-seqs"), "cuda_graphs": (True, "--enforce-eager")}
    for name, (default, option) in options.items():
        if c.engine == "vllm" and getattr(c, name) != default:
            yield (
                f"{name}={getattr(c, name)!r}: with engine='vllm' the server decides, by its option {option} "
                f"(vllm_server_args, or the command that you start it with); remove {name}"
            )


def keeps_best(c: Any) -> bool:
    """Whether an evaluation chooses the step whose weights are kept."""
    return bool(c.load_best_model_at_end or c.save_strategy == "best")


def _of_best_model(c: Any) -> Iterator[str]:
    """Trainer looks the metric up after the first evaluation: check that it will exist."""
    askers = {
        "load_best_model_at_end=True": c.load_best_model_at_end,
        "save_strategy='best'": c.save_strategy == "best",
        f"lr_scheduler_type={c.lr_scheduler_type!r}": c.lr_scheduler_type in MEASURING,
    }
    asker = next((text for text, asks in askers.items() if asks), None)
    metric, choices = c.metric_for_best_model, f"such as {', '.join(MEASURES)} (docs/metrics.md)"
    if metric is None and asker is not None:
        yield f"{asker} needs metric_for_best_model: set it to what an evaluation measures, {choices}"
    elif metric is not None and _measure(metric) is None:
        yield f"metric_for_best_model={metric!r}: an evaluation logs no such metric, choose one {choices}"
    elif metric is not None and c.greater_is_better is None:
        yield f"metric_for_best_model={metric!r}: set greater_is_better, to say which end is better"
    if asker is not None and c.eval_strategy == "no":
        yield f"{asker} needs evaluations: set eval_strategy='steps' with eval_steps, and an eval_dataset"
