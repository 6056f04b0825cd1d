"""What a run starts from, where the name of its model does not say it: an adapter or changed weights in memory."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from bondlm.errors import ConfigError
from bondlm.models.adapters import adapter_weights, adds_nothing, edits_base
from bondlm.models.on_file import changed_weight
from bondlm.models.sharding import whole
from bondlm.runs.folder import START
from bondlm.training.processes import World, decided_by_main
from bondlm.training.saving import answering

_log = logging.getLogger(__name__)


def start_of(model: Any, name: str, output_dir: Any, *, adapter: bool) -> str:
    """The name of the run's start, which is its reference, for the settings file; empty if no file has it.

    For a model in memory that has a trained adapter this is a folder of the run, written by `keep_start`. `adapter`:
    whether it gets a fresh one.

    Raises:
        ConfigError: an adapter is trained on a base that is not the one on file, where it would be loaded later.
    """
    if isinstance(model, str) or not name:
        return name
    by_adapter = isinstance(model, PeftModel) and edits_base(model)  # as it will again when it is loaded
    changed = "" if by_adapter else changed_weight(model)
    if changed and (adapter or isinstance(model, PeftModel)):
        raise ConfigError(
            f"model: its weights have been changed since they were loaded from {name!r} (first: {changed}), and the "
            "adapter would be loaded onto those on file. Save the model with its tokenizer (save_pretrained), and give "
            "that folder, or a model loaded from it"
        )
    if changed:
        _log.warning(
            "the model's weights have been changed since they were loaded from %r (first: %s): the settings file names "
            "no model. Save the model before training if `bondlm eval` or `merge` are to use it as --reference",
            name,
            changed,
        )
        return ""
    is_trained = isinstance(model, PeftModel) and not adds_nothing(model)
    return str(Path(str(output_dir)).absolute() / START) if is_trained else name


def keep_start(roles: Any, encoder: Any, args: Any, start: str | None, *, is_new: bool) -> None:
    """Store the adapter that a run starts with in its folder, if that is what `start` names; the policy still has it.

    A resumed run must start with the same one. Every process must call this.

    Raises:
        ConfigError: the run started with another adapter.
    """
    kept = Path(str(args.output_dir)).absolute() / START
    if start != str(kept):
        return
    if not is_new:
        weights = {name: whole(weight) for name, weight in adapter_weights(roles.model).items()}
        decided_by_main(lambda: _refuse_another(kept, weights), World.of(args), wait_s=args.ddp_timeout)
        return
    roles.save(str(kept), is_main=args.should_save)
    if args.should_save:
        encoder.tokenizer.save_pretrained(str(kept))
        answering(encoder).save_pretrained(str(kept))


def _refuse_another(kept: Path, weights: dict[str, torch.Tensor]) -> None:
    file = kept / "adapter_model.safetensors"
    if not file.is_file():
        return
    before = load_file(file)
    if before.keys() != weights.keys() or not all(torch.equal(before[n], w.cpu()) for n, w in weights.items()):
        raise ConfigError(
            f"model: the run in {str(kept.parent)!r} started from the adapter in {str(kept)!r}, but this one has "
            "different weights: pass that folder's adapter, or choose another output_dir"
        )
