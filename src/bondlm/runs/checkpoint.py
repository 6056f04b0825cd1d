"""Our part of a checkpoint: the anchor and, if a run has them, averaged weights, quantile model, signal factor.

`transformers.Trainer` saves policy, optimizer, scheduler, RNGs and state.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from bondlm.errors import BondError, CheckpointError, ConfigError, DataError, ResourceError, out_of_space
from bondlm.runs.folder import is_main_process, whole
from bondlm.runs.manifest import remove_unfinished

DATA_FILE = "data.json"
ANCHOR_FILE = "anchor.safetensors"
AVERAGE_FILE = "average.safetensors"
QUANTILE_FILE = "quantile.safetensors"
DROPS_FILE = "drops.json"  # numbers of prompts seen and dropped
CUTS_FILE = "cuts.json"  # number of tokens learned from at a time
FACTOR_FILE = "signal_factor.json"  # if the signal follows the measured N
MEANS_FILE = "means.json"  # metrics of the steps since the last log, of each process


def require_space(
    folder: Path,
    anchor_bytes: int,
    *,
    num_checkpoints: int,
    by_deepspeed: bool = False,
    averaged: bool = False,
    model_bytes: int = 0,
) -> tuple[int, int]:
    """Check that `folder` has room for its checkpoints and `model_bytes`; returns the bytes free and needed.

    A checkpoint has the policy, its anchor in fp32 (`anchor_bytes`) and two moments of the optimizer: four times the
    trained weights, and once more if they are `averaged`. DeepSpeed writes the policy twice more, in its own dtype and
    in fp32.

    Raises:
        ResourceError: there is too little room.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    needed = num_checkpoints * ((6 if by_deepspeed else 4) + averaged) * anchor_bytes + model_bytes
    if free < needed:
        what = f"{num_checkpoints} checkpoints" + (" and the model" if model_bytes else "")
        raise ResourceError(
            f"{existing} has {free / 2**30:.2f} GiB free, {what} need about {needed / 2**30:.2f} GiB: free some space, "
            "choose another output_dir, or lower save_total_limit"
        )
    return free, needed


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, which gets its final name only when complete."""
    with whole(path) as partial:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def load_tensors(path: Path, load: Callable[[dict[str, Tensor]], None]) -> None:
    """Pass the file's tensors to `load`.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model: a run must never continue with a fresh
            anchor.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: without it a run cannot be continued (it would silently start this part afresh). "
            "Resume from an older checkpoint, or start a new run from these weights."
        )
    try:
        load(safetensors.torch.load_file(path))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this run: {error}") from error


def prompts_per_step(args: Any) -> dict[str, Any]:
    """The number of prompts that all processes learn from per step, and its factors."""
    parts = (args.world_size, args.train_batch_size, args.gradient_accumulation_steps)
    return {
        "prompts_per_step": math.prod(parts),
        "made_of": "{} processes x per_device_train_batch_size={} x gradient_accumulation_steps={}".format(*parts),
    }


def streamed_to(path: Path) -> dict[str, Any] | None:
    """A checkpoint's record of the prompts from a stream; None if the data were read as a whole.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return dict(before) | {"rows": int(before["rows"])} if before.get("streamed") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): resume from an older checkpoint") from error


def refuse_other_data(path: Path, now: Mapping[str, Any]) -> None:
    """Compare the data digest in a checkpoint with that of the data `now`.

    Raises:
        DataError: the run was trained on other data.
        ConfigError: the data are the same, but the tokenizer or its template gives other tokens, or the number of
            prompts per step has changed: a checkpoint counts steps, so some prompts would be left out or used twice.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        rows, text, tokens = before["rows"], before["text"], before["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): resume from an older checkpoint") from error
    if (rows, text) != (now["rows"], now["text"]):
        raise DataError(
            f"train_dataset has changed since {path.parent.name} was saved ({rows} rows then, {now['rows']} now, with "
            "other contents): restore it, or start a new run from these weights in another output_dir"
        )
    if before["prompts_per_step"] != now["prompts_per_step"]:
        raise ConfigError(
            f"{path.parent.name} was trained with {before['prompts_per_step']} prompts per step ({before['made_of']}), "
            f"now it would be {now['prompts_per_step']} ({now['made_of']}): prompts would be left out or trained "
            "twice. Keep the product the same"
        )
    if tokens != now["tokens"]:
        raise ConfigError(
            f"the tokenizer, its chat template, prompt_format, chat_template_kwargs or truncate_prompt makes other "
            f"tokens of the prompts than when {path.parent.name} was saved: restore it, or start a new run from these "
            "weights in another output_dir"
        )


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a failure to write into `folder` into one clear error, and remove the incomplete checkpoint.

    Raises:
        ResourceError: the disk is full.
        CheckpointError: the folder can no longer be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, BondError) or (full := _is_full(error, folder)) is None:
            raise
        size = max((_size(path) for path in folder.glob("checkpoint-*")), default=0)
        existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        if full:
            removed = remove_unfinished(folder) if is_main_process() else []  # the main process may still write there
            raise ResourceError(
                f"the disk of {existing} is full: {shutil.disk_usage(existing).free} bytes are free, a checkpoint "
                f"needs about {size}. {'; '.join(removed) or 'Nothing half-written is left'}. The same command "
                f"continues from the last checkpoint once there is space ({str(error).splitlines()[0]})"
            ) from error
        raise CheckpointError(
            f"{folder} cannot be written any more ({str(error).splitlines()[0]}): mount it again, or make it writable; "
            "the same command then continues from the last checkpoint"
        ) from error


def _is_full(error: Exception, folder: Path) -> bool | None:
    """True: no space; False: `folder` cannot be written; None: the error is not about writing there."""
    if out_of_space(error):
        return True
    if isinstance(error, OSError):
        name = error.filename if isinstance(error.filename, str | Path) else None
        inside = name is not None and Path(name).resolve().is_relative_to(folder.resolve())
        return False if inside else None
    text = str(error)
    if isinstance(error, SafetensorError) or "I/O error" in text:  # raised by Rust, with the error number in its text
        return False if "os error" in text else None
    # torch's writer does not say why it failed; if the folder still exists, the disk is full.
    return folder.is_dir() if "PytorchStreamWriter" in text or "inline_container" in text else None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
