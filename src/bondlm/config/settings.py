"""What is known of each setting of a run: its range, what it needs, whether it may change when a run goes on."""

from dataclasses import Field, dataclass, field
from typing import Any, Literal

from bondlm.objectives.rules import Rule, at_least, off


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is known of a setting beside its default and its text.

    `may_change` is about a run that is continued: it may have another value "on demand" (`allow_config_change`),
    "always", "if endless" (its learning rates do not depend on its length), or "never" (the checkpoint holds it).
    """

    rule: Rule | None = None  # None: any value, or its objective has the rule
    needs: tuple[str, str] | None = None  # another setting, and the value of it without which this one has no effect
    may_change: Literal["on demand", "always", "if endless", "never"] = "on demand"
    shared: bool = False  # all processes of a run must have the same


def setting(default: Any, help_text: str, rule: Rule | None = None, **more: Any) -> Any:
    """A setting of ours; `help_text` is what `bondlm train --help` says (it reads the source)."""
    made: Field[Any] = field(default=default, metadata={"help": help_text})
    OWN[made] = Setting(rule=rule, shared=True, **more)  # metadata would reach argparse, by `HfArgumentParser`
    return made


OWN: dict[Field[Any], Setting] = {}


# Of transformers' own settings, those of which something is known.
OF_TRANSFORMERS: dict[str, Setting] = {
    **dict.fromkeys(("max_steps", "num_train_epochs"), Setting(may_change="if endless", shared=True)),
    **dict.fromkeys(("output_dir", "save_steps", "eval_steps", "eval_strategy"), Setting(may_change="always")),
    # A step must have as many prompts as before: the checkpoint knows how many (runs/checkpoint.py).
    "per_device_train_batch_size": Setting(may_change="always", shared=True),
    "gradient_accumulation_steps": Setting(may_change="always", shared=True),
    **dict.fromkeys(("optim", "adam_beta1", "adam_beta2", "adam_epsilon"), Setting(may_change="never")),
    "weight_decay": Setting(may_change="never", shared=True),
    **dict.fromkeys(("seed", "data_seed", "max_grad_norm", "bf16", "fp16"), Setting(shared=True)),
    "save_total_limit": Setting(
        rule=at_least(2, "a crash while saving could leave no checkpoint"), may_change="always"
    ),
    "save_only_model": Setting(rule=off("no run could be continued from such checkpoints")),
    "ignore_data_skip": Setting(rule=off("a run that is continued would take its first prompts again")),
    "use_liger_kernel": Setting(
        rule=off(
            "remove it. Trainer would put the kernels into the policy after the anchor and the reference were copied "
            "from it, so that the roles round differently, and its fused loss needs labels that are not there; "
            "bondlm's head already makes no logits beyond a fixed budget (docs/speed.md)"
        )
    ),
}
