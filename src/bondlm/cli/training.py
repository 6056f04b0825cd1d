"""What the commands `sft` and `reward-model` share: arguments of transformers, a fresh folder, progress, facts."""

import importlib.metadata
import json
import logging
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bondlm.cli.options import LORA
from bondlm.errors import CheckpointError, ConfigError, NonFiniteError
from bondlm.runs.folder import plain, write_whole

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


def fresh_folder(options: Mapping[str, Any], default: str) -> Path:
    """The output folder, without a model in it.

    Raises:
        CheckpointError: it holds a model already.
    """
    folder = Path(str(options.get("output_dir") or default))
    for name in ("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"):
        if (folder / name).exists():
            raise CheckpointError(f"{folder} already holds a model ({name}): choose another output_dir or remove it")
    return folder


def training_arguments(options: Mapping[str, Any], folder: Path, own: Mapping[str, Any], learning_rate: float) -> Any:
    """`transformers.TrainingArguments` from the options that are not the command's own.

    Raises:
        ConfigError: a value is refused.
    """
    from transformers import TrainingArguments

    settings = {k: v for k, v in options.items() if k not in own and k not in LORA and k != "output_dir"}
    try:
        return TrainingArguments(**(DEFAULTS | {"learning_rate": learning_rate, "output_dir": str(folder)} | settings))
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"a setting was refused: {error}") from error


def quiet() -> None:
    """Let the command speak alone."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def silence(trainer: Any) -> None:
    """Drop the trainer's own prints."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def fit(trainer: Any, console: Console) -> float:
    """Train, printing a line each logged step; returns the seconds.

    Raises:
        NonFiniteError: the loss, or a weight that is to be saved, became NaN or infinite.
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
                    f"step {state.global_step}/{state.max_steps}  loss {loss:.4f}  {time.perf_counter() - began:.0f} s",
                    highlight=False,
                )

    trainer.add_callback(Lines())
    trainer.train()
    return time.perf_counter() - began


def write_facts(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write a JSON file of what was measured, with versions; it appears whole or not at all."""
    versions = {package: importlib.metadata.version(package) for package in ("bondlm", "torch", "transformers")}
    content = plain(dict(facts) | {"versions": versions})  # an interval of one prompt is infinite, which JSON is not
    write_whole(folder / name, json.dumps(content, indent=2, allow_nan=False) + "\n")
