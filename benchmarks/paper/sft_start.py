"""SFT for the T5 task, with its weight changes in one small file: the same reference on every machine.

    python benchmarks/paper/sft_start.py models/flan-t5-small-title changes.npz models/t5-debian-sft500x32

Each weight's change is rounded to 63 levels of its row's largest change before the model is saved, so the reference
*is* the base plus these rounded changes, and the file loses nothing.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LEVELS = 31  # on each side of 0
WEIGHTS = "model.safetensors"


def finetune(source: Path, data: Path, folder: Path, steps: int, batch: int) -> dict[str, float]:
    """Fine-tune on `sft.jsonl`; `folder` appears only when complete. Returns the held-out loss before and after."""
    from transformers import PrinterCallback, TrainingArguments

    from bondlm.stages.rows import read_answers
    from bondlm.stages.sft import sft_trainer

    temporary = folder.with_name(folder.name + ".tmp")
    on_gpu = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(temporary),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=4e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        logging_steps=50,
        save_strategy="no",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
    )
    rows = [read_answers(str(data / f"{name}.jsonl"), "reference") for name in ("sft", "heldout")]
    trainer = sft_trainer(str(source), rows[0], rows[1], args, max_completion_length=64)
    trainer.remove_callback(PrinterCallback)
    before = float(trainer.evaluate()["eval_loss"])
    trainer.train()
    trainer.save_model(str(temporary))
    round_changes(source, temporary)
    after = load_file(temporary / WEIGHTS, device=str(trainer.args.device))
    trainer.model.load_state_dict(after, strict=False)
    loss = {"before": before, "after": float(trainer.evaluate()["eval_loss"])}
    (temporary / "sft.json").write_text(json.dumps({"steps": steps, "batch": batch, "held_out_loss": loss}))
    temporary.rename(folder)
    return loss


def changes(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each tensor, the levels (int8) and the size of a level per row."""
    found = {}
    for name, weight in tuned.items():
        change = (weight.float() - base[name].float()).view(len(weight), -1)
        step = change.abs().amax(dim=1, keepdim=True) / LEVELS
        levels = torch.where(step > 0, change / step.clamp(min=1e-30), 0).round().to(torch.int8)
        found[name] = levels, step
    return found


def changed(base: dict[str, Tensor], rounded: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        name: base[name].float() + (levels.float() * step).view(base[name].shape)
        for name, (levels, step) in rounded.items()
    }


def of_base(source: Path, names: Any) -> dict[str, Tensor]:
    """The base's weights, under the names the tuned model saves them by."""
    base = load_file(source / WEIGHTS)
    shared = [name for name in ("shared.weight", "encoder.embed_tokens.weight") if name in base]
    return {name: base[name] if name in base else base[shared[0]] for name in names}


def round_changes(source: Path, folder: Path) -> None:
    """Replace the saved weights by the base plus rounded changes, and save the changes beside them."""
    tuned = load_file(folder / WEIGHTS)
    base = of_base(source, tuned)
    rounded = changes(base, tuned)
    save_file(changed(base, rounded), folder / WEIGHTS, metadata={"format": "pt"})
    arrays = {f"{name}.{i}": part.numpy() for name, parts in rounded.items() for i, part in enumerate(parts)}
    np.savez(folder / "changes.npz", **arrays)  # xz halves it


def unpack(source: Path, file: Path, folder: Path) -> None:
    """Rebuild the tuned model from the base and the changes."""
    arrays = np.load(file)
    names = sorted({name.rpartition(".")[0] for name in arrays.files})
    rounded = {name: (torch.from_numpy(arrays[f"{name}.0"]), torch.from_numpy(arrays[f"{name}.1"])) for name in names}
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.copytree(source, temporary)
    save_file(changed(of_base(source, names), rounded), temporary / WEIGHTS, metadata={"format": "pt"})
    temporary.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("changes", type=Path)
    parser.add_argument("folder", type=Path, help="folder for the tuned model")
    args = parser.parse_args()
    unpack(args.base, args.changes, args.folder)


if __name__ == "__main__":
    main()
