"""Shared parts of the commands `sft` and `reward-model`: training arguments, output folder, progress, facts."""

import importlib.metadata
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bondlm.cli.options import LORA
from bondlm.errors import CheckpointError, ConfigError, NonFiniteError
from bondlm.objectives.rules import Rule, above, at_least, between, off, one_of, whole
from bondlm.runs.folder import is_main_process, plain, weights_file, write_whole
from bondlm.runs.manifest import has_settings

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # it would log 0 for a loss that is NaN
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "remove_unused_columns": False,
}

_RESUMES = "no checkpoint is resumed from, the command trains from the start; remove it"
_NO_METRICS = "only the loss is measured; remove it"
# Settings that the commands do not use or support; values of the wrong kind are also refused.
_RULES: dict[str, Rule] = {
    "max_steps": Rule(lambda value: value == -1 or value >= 1, "must be >= 1, or -1 for num_train_epochs"),
    "num_train_epochs": above(0),
    "learning_rate": at_least(0),
    "seed": between(0, 2**32 - 1),
    **dict.fromkeys(("max_prompt_length", "max_completion_length", "max_length"), whole(1)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), at_least(1)),
    "gradient_accumulation_steps": at_least(1),
    "logging_nan_inf_filter": off("it logs 0 for a loss that is not finite, which must end the command; remove it"),
    "resume_from_checkpoint": off(_RESUMES),
    "ignore_data_skip": off(_RESUMES),
    "restore_callback_states_from_checkpoint": off(_RESUMES),
    "enable_jit_checkpoint": off(_RESUMES),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), off("the losses here are bondlm's own; remove it")),
    "do_predict": off("nothing is predicted; `bondlm sample` answers prompts"),
    "label_names": off("the labels are the answers' tokens, or pairs, which have none; remove it"),
    "prediction_loss_only": off(_NO_METRICS),
    "batch_eval_metrics": off(_NO_METRICS),
    "include_for_metrics": off(_NO_METRICS),
    "eval_use_gather_object": off(_NO_METRICS),
    "eval_do_concat_batches": Rule(bool, _NO_METRICS),
    "metric_for_best_model": one_of("loss", "eval_loss", why="nothing else is measured"),
}


def checked(options: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """The options that are set, after checking that each is valid and has an effect; `rules` are the command's own.

    Raises:
        ConfigError: a value has the wrong kind, is out of range, or has no effect.
    """
    from bondlm.config import SETTINGS
    from bondlm.config.checks import other_kind
    from bondlm.config.settings import LOOP

    all_rules = {**LOOP, **_RULES, **rules}
    problems, given = [], {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        kinds = SETTINGS[name].kinds if name in SETTINGS else frozenset()
        rule = all_rules.get(name)
        problems.append(other_kind(name, value, kinds) or (rule and rule.problem(name, value)))
    if found := [problem for problem in problems if problem]:
        raise ConfigError("; ".join(found))
    return given


def fresh_folder(options: Mapping[str, Any], default: str) -> Path:
    """The output folder, without a model and without a run in it.

    Raises:
        CheckpointError: it already has a model, or a run that has not saved one.
    """
    folder = Path(str(options.get("output_dir") or default))
    if (name := weights_file(folder)) is not None:
        raise CheckpointError(f"{folder} already holds a model ({name}): choose another output_dir or remove it")
    if has_settings(folder):
        raise CheckpointError(f"{folder} holds a run that has not saved its model: choose another output_dir")
    return folder


def training_arguments(
    options: Mapping[str, Any], folder: Path, own: Mapping[str, Any], learning_rate: float, rows: int
) -> Any:
    """`transformers.TrainingArguments` from the options that are not the command's own, for this many training rows.

    Raises:
        ConfigError: a value is refused, or there would be no step.
    """
    from transformers import TrainingArguments

    from bondlm.config.changes import spelled
    from bondlm.config.checks import check_best_checkpoint, refused_plainly, require_loggers
    from bondlm.config.optimization import check_optimization
    from bondlm.training.data import require_a_batch

    settings = {k: spelled(k, v) for k, v in options.items() if k not in own and k not in LORA and k != "output_dir"}
    if "save_strategy" not in settings and "save_steps" in settings:
        settings["save_strategy"] = "steps"  # transformers' default
    elif "save_strategy" not in settings and (limit := settings.get("save_total_limit")):
        raise ConfigError(
            f"save_total_limit={limit!r}: the command saves no checkpoint, only the model at its end. Set save_steps, "
            "or remove it"
        )
    if settings.get("save_strategy") == "best":
        settings.setdefault("metric_for_best_model", "loss")
    with refused_plainly():
        args = TrainingArguments(**(DEFAULTS | {"learning_rate": learning_rate, "output_dir": str(folder)} | settings))
    require_loggers(list(args.report_to or ()))
    check_best_checkpoint(args)
    check_optimization(args)
    require_a_batch(rows, args, "rows")
    return args


def quiet() -> None:
    """Silence libraries, so that only the command prints."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def silence(trainer: Any) -> None:
    """Drop the trainer's own prints."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def fit(trainer: Any, console: Console) -> float:
    """Train, printing a line per logged step and per evaluation; returns the seconds.

    Raises:
        NonFiniteError: the loss, or a weight to be saved, became NaN or infinite.
    """
    from transformers import TrainerCallback

    began = time.perf_counter()

    class Lines(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if logs and "loss" in logs:
                loss = float(logs["loss"])
                if not abs(loss) < float("inf"):
                    raise NonFiniteError(f"step {state.global_step}: the loss is {loss}: lower learning_rate")
                console.print(
                    f"step {state.global_step}/{state.max_steps}  loss {loss:.4f}  {time.perf_counter() - began:.0f} s"
                )
            if logs and "eval_loss" in logs:
                console.print(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}")

    lines = Lines()
    trainer.add_callback(lines)
    trainer.train()
    trainer.remove_callback(lines)
    return time.perf_counter() - began


def write_facts(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write a JSON file of the results atomically, with versions; of several processes the main one writes it."""
    if not is_main_process():
        return
    versions = {package: importlib.metadata.version(package) for package in ("bondlm", "torch", "transformers")}
    content = plain(dict(facts) | {"versions": versions})  # one prompt's interval is infinite, which JSON forbids
    write_whole(folder / name, json.dumps(content, indent=2, allow_nan=False) + "\n")
