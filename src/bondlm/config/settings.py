"""Properties of each setting: its range, what it needs, whether it may change on resume."""

from dataclasses import Field, dataclass, field
from typing import Any, Literal

from bondlm.objectives.rules import Rule, above, at_least, between, finite, off, one_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Properties of a setting besides its default and its help text.

    `may_change`: a resumed run may have a different value "on demand" (`allow_config_change`), "always", "if endless"
    (its learning rates do not depend on its length), or "never" (the checkpoint holds it).
    """

    rule: Rule | None = None  # None: any value, or its objective has the rule
    needs: tuple[str, str] | None = None  # another setting, and the value it must have for this one to have an effect
    may_change: Literal["on demand", "always", "if endless", "never"] = "on demand"
    shared: bool = False  # must be the same on all processes of a run
    kinds: frozenset[type] = frozenset()  # of its values, where these are plain


def setting(default: Any, help_text: str, rule: Rule | None = None, **more: Any) -> Any:
    """A setting of ours; `help_text` is what `bondlm train --help` says (it reads the source)."""
    made: Field[Any] = field(default=default, metadata={"help": help_text})
    OWN[made] = Setting(rule=rule, shared=True, **more)  # metadata would reach argparse, by `HfArgumentParser`
    return made


OWN: dict[Field[Any], Setting] = {}


def _unless(why: str, *neutral: Any) -> Setting:
    """A setting of transformers that does nothing here: other values than the `neutral` ones are refused."""
    return Setting(rule=Rule(lambda value: value in neutral, why))


_NO_LABELS = "completions have rewards, not labels; remove it"
_NO_LOOP = "evaluate() draws and scores completions: use per_device_eval_batch_size and max_rows"
_NO_LOSS = "evaluate() measures only reward, win rate, effective N and KL; remove it"
_PRECISION = "an evaluation uses the run's precision: set bf16 or fp16, or dtype"
_BY_LENGTH = "prompts of similar length learn together anyway; remove it"

# What Trainer reads only in methods that `BONDTrainer` overrides or does not call.
_WITHOUT_EFFECT: dict[str, Setting] = {
    "label_smoothing_factor": _unless(_NO_LABELS, 0),
    "label_names": _unless(_NO_LABELS, None, []),
    "eval_accumulation_steps": _unless(_NO_LOOP, None),
    "eval_do_concat_batches": _unless(_NO_LOOP, True),
    "eval_use_gather_object": _unless(_NO_LOOP, False),
    "prediction_loss_only": _unless(_NO_LOSS, False),
    "batch_eval_metrics": _unless(_NO_LOSS, False),
    "include_for_metrics": _unless(_NO_LOSS, None, []),
    "do_predict": _unless("nothing is predicted; `bondlm sample` answers prompts", False),
    "bf16_full_eval": _unless(_PRECISION, False),
    "fp16_full_eval": _unless(_PRECISION, False),
    "train_sampling_strategy": Setting(
        rule=one_of("random", "sequential", why="prompts of similar length learn together anyway")
    ),
    "length_column_name": _unless(_BY_LENGTH, "length"),
    "average_tokens_across_devices": _unless("the loss is always the mean over the prompts of all processes", True),
    "auto_find_batch_size": _unless(
        "a step that does not fit into memory is taken in smaller parts anyway, with the same gradient; remove it",
        False,
    ),
    "include_num_input_tokens_seen": _unless(
        "num_tokens, num_tokens/learned and num_tokens/compared are always logged; remove it", False, "no"
    ),
    "logging_nan_inf_filter": _unless(
        "a loss that is not finite is left out of the logged mean, and its step is skipped and counted; remove it", True
    ),
    "use_cache": _unless("sampling always uses a cache, and learning needs none; remove it", False),
    "liger_kernel_config": _unless("use_liger_kernel is not supported; remove it", None),
    "enable_jit_checkpoint": _unless(
        "its checkpoints lack the anchor; SIGTERM makes `bondlm train` save and end, without it", False
    ),
    "resume_from_checkpoint": _unless(
        "use trainer.train(resume_from_checkpoint=...); `bondlm train` has resume: auto, never, or a folder", None
    ),
    "hub_always_push": _unless("a run is uploaded once, with its model card; remove it", False),
    "parallelism_config": _unless("bondlm supports DDP, FSDP2 and DeepSpeed (docs/scaling.md); remove it", None),
    "debug": Setting(
        rule=Rule(lambda value: "tpu_metrics_debug" not in (value or ()), "tpu_metrics_debug is for TPUs; remove it")
    ),
}

LEVELS = ("passive", "debug", "info", "warning", "error", "critical", "detail")
# Ranges that Trainer does not check: it would never log, or fail after the first rollout.
LOOP: dict[str, Rule] = {
    "max_steps": at_least(-1, "-1 is for num_train_epochs"),  # 0 is a run of no step, as in transformers
    "num_train_epochs": at_least(0),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), above(0)),
    **dict.fromkeys(("eval_delay", "dataloader_num_workers"), at_least(0)),
    **dict.fromkeys(("log_level", "log_level_replica"), one_of(*LEVELS)),
}

# Properties of the settings inherited from transformers.
OF_TRANSFORMERS: dict[str, Setting] = {
    **_WITHOUT_EFFECT,
    **{name: Setting(rule=rule) for name, rule in LOOP.items()},
    **{
        name: Setting(rule=LOOP[name], may_change="if endless", shared=True)
        for name in ("max_steps", "num_train_epochs")
    },
    **{
        name: Setting(rule=LOOP[name], may_change="always")
        for name in ("save_steps", "eval_steps", "log_level", "log_level_replica")
    },
    **dict.fromkeys(
        ("output_dir", "eval_strategy", "save_strategy", "logging_strategy", "logging_first_step", "disable_tqdm"),
        Setting(may_change="always"),
    ),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"), Setting(may_change="always")),
    # A step must have as many prompts as before: the checkpoint knows how many (runs/checkpoint.py).
    "per_device_train_batch_size": Setting(rule=at_least(1), may_change="always", shared=True),
    "gradient_accumulation_steps": Setting(rule=at_least(1), may_change="always", shared=True),
    **dict.fromkeys(("optim", "adam_beta1", "adam_beta2", "adam_epsilon"), Setting(may_change="never")),
    "weight_decay": Setting(rule=finite(0), may_change="never", shared=True),
    "seed": Setting(rule=between(0, 2**32 - 1), shared=True),  # NumPy takes no larger one
    **dict.fromkeys(("data_seed", "max_grad_norm"), Setting(rule=at_least(0), shared=True)),
    **dict.fromkeys(("bf16", "fp16"), Setting(shared=True)),
    "save_total_limit": Setting(
        rule=at_least(2, "a crash while saving could leave no checkpoint"), may_change="always"
    ),
    "save_only_model": Setting(rule=off("a run cannot be resumed from such checkpoints")),
    "ignore_data_skip": Setting(rule=off("a resumed run would train on its first prompts again")),
    "use_liger_kernel": Setting(
        rule=off(
            "remove it. Trainer would put the kernels into the policy after the anchor and the reference were copied "
            "from it, so that the roles round differently, and its fused loss needs labels that are not there; "
            "bondlm's head already makes no logits beyond a fixed budget (docs/speed.md)"
        )
    ),
}
