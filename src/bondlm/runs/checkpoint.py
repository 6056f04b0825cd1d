"""Our part of a checkpoint: the anchor, and what else a run has: averaged weights, quantile model, signal factor.

`transformers.Trainer` saves policy, optimizer, scheduler, RNGs and state.
"""

import errno
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from bondlm.errors import BondError, CheckpointError, ConfigError, DataError, ResourceError
from bondlm.runs.folder import whole
from bondlm.runs.manifest import remove_unfinished

DATA_FILE = "data.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ANCHOR_FILE = "anchor.safetensors"
AVERAGE_FILE = "average.safetensors"
QUANTILE_FILE = "quantile.safetensors"
DROPS_FILE = "drops.json"  # how many prompts were seen, and how many dropped
CUTS_FILE = "cuts.json"  # how many tokens are learned from at a time
FACTOR_FILE = "signal_factor.json"  # where the signal follows the measured N
MEANS_FILE = "means.json"  # metrics of the steps since the last log, of each process


def require_space(
    folder: Path, anchor_bytes: int, *, num_checkpoints: int, by_deepspeed: bool = False, averaged: bool = False
) -> None:
    """Raise ResourceError unless `folder` has room for its checkpoints; asked before the first step, not at the last.

    A checkpoint is the policy, its anchor in fp32 (`anchor_bytes`) and two moments of the optimizer: four times the
    trained weights, and once more where they are `averaged`. DeepSpeed writes the policy twice more, as it is and in
    fp32.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    size = ((6 if by_deepspeed else 4) + averaged) * anchor_bytes
    if free < num_checkpoints * size:
        raise ResourceError(
            f"{existing} has {free / 2**30:.2f} GiB free, {num_checkpoints} checkpoints need about "
            f"{num_checkpoints * size / 2**30:.2f} GiB: free some space, choose another output_dir, or lower "
            "save_total_limit"
        )


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, under its final name only when whole."""
    with whole(path) as partial:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def load_tensors(path: Path, load: Callable[[dict[str, Tensor]], None]) -> None:
    """Give the file's tensors to `load`.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model: a run must never go on with a fresh anchor.
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
    """How many prompts all processes together learn from in a step, and of what that is the product."""
    parts = (args.world_size, args.train_batch_size, args.gradient_accumulation_steps)
    return {
        "prompts_per_step": math.prod(parts),
        "made_of": "{} processes x per_device_train_batch_size={} x gradient_accumulation_steps={}".format(*parts),
    }


def streamed_to(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of the prompts of a stream that it has learned from; None if they were read whole.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return dict(before) | {"rows": int(before["rows"])} if before.get("streamed") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): resume from an older checkpoint") from error


def refuse_other_data(path: Path, now: Mapping[str, Any]) -> None:
    """Compare the digest that a checkpoint holds with that of the data `now`.

    Raises:
        DataError: the data are not those that the run was trained on.
        ConfigError: they are, but the tokenizer or its template makes other tokens of them, or a step takes more or
            fewer prompts: a checkpoint counts steps, so some would be left out or taken twice.
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
    if before.get("prompts_per_step", now["prompts_per_step"]) != now["prompts_per_step"]:
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
    """Turn a failure to write into `folder` into one clear error; the checkpoint that was cut short is removed.

    Raises:
        ResourceError: the disk is full.
        CheckpointError: the folder cannot be written any more.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, BondError) or (full := _is_full(error, folder)) is None:
            raise
        size = max((_size(path) for path in folder.glob("checkpoint-*")), default=0)
        existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        if full:
            removed = remove_unfinished(folder)
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
    if isinstance(error, OSError):
        if error.errno in NO_SPACE:
            return True
        name = error.filename if isinstance(error.filename, str | Path) else None
        inside = name is not None and Path(name).resolve().is_relative_to(folder.resolve())
        return False if inside else None
    text = str(error)
    if isinstance(error, SafetensorError) or "I/O error" in text:  # raised by Rust, with the number in its text
        found = re.search(r"os error (\d+)", text)
        return None if found is None else int(found.group(1)) in NO_SPACE
    # torch's writer does not say why it failed; a folder that is still there has no space left.
    return folder.is_dir() if "PytorchStreamWriter" in text or "inline_container" in text else None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
