"""Build the run's optimizer and schedule for a single number: Trainer builds them only when training begins."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from bondlm.errors import ConfigError

# Parts of the names of optimizers that have target modules, and of those that are built from the model.
WITH_TARGETS = ("galore", "apollo")
WITH_MODEL = (*WITH_TARGETS, "lomo")
WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")  # schedules
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
# Settings that a user's own optimizer, or own schedule, replaces.
OF_OPTIMIZER = ("learning_rate", "weight_decay", "optim", "optim_args", "optim_target_modules", *ADAM)
OF_SCHEDULE = ("warmup_steps", "lr_scheduler_kwargs")
OF_LAYERS = ("every_n_layers", "offload")  # what transformers takes out of gradient_checkpointing_kwargs
_FIELDS = TrainingArguments.__dataclass_fields__


def check_optimization(args: Any) -> None:
    """Build the optimizer and schedule that Trainer will build from these arguments.

    Raises:
        ConfigError: one cannot be built, or ignores an argument that is given.
    """
    optimizer = _optimizer(args if args.learning_rate is not None else _changed(args, "learning_rate", 1.0))
    if optimizer is not None:
        _check_schedule(args, optimizer)
    keywords = dict(args.gradient_checkpointing_kwargs or {})
    for_torch = {name: value for name, value in keywords.items() if name not in OF_LAYERS}
    if args.gradient_checkpointing and for_torch:
        try:
            number = torch.zeros(1, requires_grad=True)
            checkpoint(torch.nn.Identity(), number, **{"use_reentrant": False} | for_torch)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"gradient_checkpointing_kwargs={keywords!r}: {error}") from error


def check_own(optimizers: Sequence[Any], args: Any) -> None:
    """Refuse settings that do nothing next to a user's own (optimizer, schedule), None where there is none.

    Raises:
        ConfigError: one of them is set.
    """
    for what, made, names in zip(("optimizer", "schedule"), optimizers, (OF_OPTIMIZER, OF_SCHEDULE), strict=True):
        unused = [f"{name}={args.given[name]!r}" for name in names if made is not None and name in args.given]
        if unused:
            raise ConfigError(f"{unused[0]}: the {what} passed in optimizers= replaces it; remove the setting")


def _optimizer(args: Any) -> torch.optim.Optimizer | None:
    """The optimizer for one number; None for those that need the whole model."""
    from transformers import Trainer

    name, own = OptimizerNames(args.optim).value, _own_arguments(args)
    if args.optim_args and not all(part.count("=") == 1 for part in args.optim_args.split(",")):
        raise ConfigError(f"optim_args={args.optim_args!r}: write name=value, separated by commas")
    if args.optim_target_modules and not any(part in name for part in WITH_TARGETS):
        raise ConfigError(
            f"optim_target_modules={args.optim_target_modules!r}: optim={name!r} does not use it, remove it (LoRA's "
            "are lora_target_modules)"
        )
    try:
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(args)
        for said, without in own.items():
            if Trainer.get_optimizer_cls_and_kwargs(without) == (kind, keywords):
                raise ConfigError(f"{said}: optim={name!r} ignores it, remove it")
        made: torch.optim.Optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **keywords)
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"optim={name!r}: {error}") from error
    except (ValueError, TypeError) as error:
        if any(part in name for part in WITH_MODEL):
            return None
        raise ConfigError(f"{', '.join([f'optim={name!r}', *own])}: {error}") from error
    return made


def _own_arguments(args: Any) -> dict[str, Any]:
    """Each argument that only the optimizer uses, with the settings without it."""
    found = {}
    parts = args.optim_args.split(",") if args.optim_args else []
    for i, part in enumerate(parts):
        found[f"optim_args={part!r}"] = _changed(args, "optim_args", ",".join(parts[:i] + parts[i + 1 :]))
    for name in ADAM:
        if getattr(args, name) != _FIELDS[name].default:
            found[f"{name}={getattr(args, name)!r}"] = _changed(args, name, _FIELDS[name].default)
    return found


def _changed(args: Any, name: str, value: Any) -> Any:
    other = copy.copy(args)
    setattr(other, name, value)
    return other


def _check_schedule(args: Any, optimizer: torch.optim.Optimizer) -> None:
    from transformers import get_scheduler

    name, keywords = SchedulerType(args.lr_scheduler_type).value, args.lr_scheduler_kwargs
    if keywords and name in WITHOUT_ARGUMENTS:
        raise ConfigError(f"lr_scheduler_kwargs={keywords!r}: lr_scheduler_type={name!r} does not use it, remove it")
    steps = args.max_steps if args.max_steps > 0 else 10**6
    how = {"num_warmup_steps": args.get_warmup_steps(steps), "num_training_steps": steps}
    try:
        get_scheduler(name, optimizer, **how, scheduler_specific_kwargs=dict(keywords or {}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lr_scheduler_type={name!r}, lr_scheduler_kwargs={keywords!r}: {error}") from error
