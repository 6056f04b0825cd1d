"""Whether a model in memory is the one that its name stands for: it may have been changed since it was loaded."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from bondlm.models.facts import name_of

LEAST_BYTES = 2  # per number: smaller ones are quantised, with a scale of their own
ROWS = 8  # of each weight that are compared: training and merging an adapter change all of them


def changed_weight(model: Any) -> str:
    """The first weight in memory that is not the one of the file that `model` was loaded from; empty if there is none.

    An adapter's own weights do not count. Weights that the file has under another name or in another form (fused
    experts, quantised weights) are not compared, and nothing is if there is no file on this machine.
    """
    files = {key: path for path in _files(model) for key in _keys(path)}
    core, prefix = _core(model), f"{model.base_model_prefix}."
    by_file: dict[Path, list[tuple[str, str, Tensor]]] = {}
    for name, weight in core.named_parameters():
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        key = plain if plain in files else plain.removeprefix(prefix)
        if (
            key in files
            and weight.is_floating_point()
            and weight.dtype.itemsize >= LEAST_BYTES
            and weight.device.type != "meta"
        ):
            by_file.setdefault(files[key], []).append((plain, key, weight.detach()))
    for path, weights in by_file.items():
        with safe_open(path, "pt") as file:
            for name, key, weight in weights:
                if _differs(file.get_slice(key), weight):
                    return name
    return ""


def _core(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _files(model: Any) -> Iterator[Path]:
    """The model's safetensors files, in its folder or the hub's cache."""
    name, revision = name_of(model), getattr(model.config, "_commit_hash", None)
    how: dict[str, Any] = {"local_files_only": True, "revision": revision}
    how |= {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) if name else ():
        found = None
        with suppress(OSError, ValueError):  # a folder that is gone is taken for a hub name, and refused as one
            found = cached_file(name, file, **how)
        if found is not None and file == SAFE_WEIGHTS_NAME:
            yield Path(found)
        elif found is not None:
            yield from sorted(Path(found).parent.glob("*.safetensors"))


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):  # a shard that was not downloaded, or another program's file
        return []


def _differs(on_file: Any, weight: Tensor) -> bool:
    """Whether the first rows differ, in any of the precisions in which the file may have been read."""
    shape = on_file.get_shape()
    if not shape or list(weight.shape[1:]) != shape[1:]:
        return False
    rows = min(ROWS, shape[0], weight.shape[0])
    theirs, mine = on_file[:rows], weight[:rows].cpu()
    if not theirs.is_floating_point() or theirs.dtype.itemsize < LEAST_BYTES:
        return False
    read_in = (weight.dtype, torch.bfloat16, torch.float16)
    return not any(torch.equal(theirs.to(dtype).to(weight.dtype), mine) for dtype in read_in)
