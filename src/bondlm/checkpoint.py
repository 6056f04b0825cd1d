"""The anchor's part of a checkpoint; `transformers.Trainer` saves policy, optimizer, scheduler, RNGs and state."""

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from bondlm.anchor import Anchor
from bondlm.errors import CheckpointError

ANCHOR_FILE = "anchor.safetensors"


def save_anchor(anchor: Anchor, folder: Path) -> None:
    """Write the fp32 anchor beside the policy, under its final name only when whole."""
    target = folder / ANCHOR_FILE
    partial = folder / (ANCHOR_FILE + ".tmp")
    safetensors.torch.save_file(anchor.state_dict(), partial)
    partial.replace(target)


def load_anchor(anchor: Anchor, folder: Path) -> None:
    """Restore the anchor of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of another model: a run must never go on with a fresh anchor.
    """
    path = folder / ANCHOR_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: without its anchor a run cannot be continued (it would silently start again from the "
            "reference). Resume from an older checkpoint, or start a new run from these weights."
        )
    try:
        anchor.load_state_dict(safetensors.torch.load_file(path))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this run: {error}") from error
