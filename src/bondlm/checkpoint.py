"""Our part of a checkpoint: the anchor, and the learned quantile model where there is one.

`transformers.Trainer` saves policy, optimizer, scheduler, RNGs and state.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from bondlm.anchor import Anchor
from bondlm.errors import CheckpointError, ResourceError

ANCHOR_FILE = "anchor.safetensors"
QUANTILE_FILE = "quantile.safetensors"


def require_space(folder: Path, anchor: Anchor, *, num_checkpoints: int) -> None:
    """Raise ResourceError unless `folder` has room for its checkpoints; asked before the first step, not at the last.

    A checkpoint is the policy, its anchor in fp32 and two moments of the optimizer: four times the trained weights.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    size = 4 * anchor.num_bytes
    if free < num_checkpoints * size:
        raise ResourceError(
            f"{existing} has {free / 2**30:.2f} GiB free, {num_checkpoints} checkpoints need about "
            f"{num_checkpoints * size / 2**30:.2f} GiB: free some space, choose another output_dir, or lower "
            "save_total_limit"
        )


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, under its final name only when whole."""
    partial = path.with_name(path.name + ".tmp")
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


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
