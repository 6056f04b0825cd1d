"""Gradient checkpointing is the learner's: sampling keeps its cache, and draws the same samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import prompt_rows, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer

from bondlm import BONDConfig, BONDTrainer

TOKENIZER = tiny_tokenizer()


def length(completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


def run(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch, peft: bool, **changes: Any) -> dict[str, Any]:
    """Samples of three steps; widths of the decoded inputs; how often a block was checkpointed, by gradient mode."""
    args = BONDConfig(
        **{"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "max_completion_length": 6},
        **{"warmup_steps": 0, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True},
        # Recomputing rounds differently. Adam would make a whole step of a gradient that is nothing but rounding.
        **{"logging_steps": 1, "num_logged_samples": 4, "optim": "sgd"},
        **changes,
    )
    made = BONDTrainer(
        *(model, length, args, prompt_rows(12)),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if peft else None,
    )
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    widths: list[int] = []
    counts = {True: 0, False: 0}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("use_cache") and not torch.is_grad_enabled():
            widths.append(kwargs[name].shape[1])

    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[torch.is_grad_enabled()] += 1
        return plain(*args, **kwargs)

    plain = torch.utils.checkpoint.checkpoint
    made.roles.core.register_forward_pre_hook(note, with_kwargs=True)
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.checkpoint.checkpoint", counting)
        patch.setattr("transformers.modeling_utils.checkpoint", counting)
        made.train()
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {"samples": rows, "widths": widths, "counts": counts}


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("build", [tiny_causal, tiny_gpt2, tiny_t5], ids=["llama", "gpt2", "t5"])
def test_samples_and_cache_are_those_without_it(
    build: Callable[..., Any], peft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = run(tmp_path / "off", build(TOKENIZER), monkeypatch, peft)
    on = run(tmp_path / "on", build(TOKENIZER), monkeypatch, peft, gradient_checkpointing=True)
    assert off["counts"] == {True: 0, False: 0}
    assert on["counts"][True] > 0  # it was on while learning
    assert on["counts"][False] == 0  # and nowhere else
    assert on["widths"] == off["widths"]
    assert on["widths"].count(1) > len(on["widths"]) / 2  # a token at a time, behind the cache
    assert on["samples"] == off["samples"]
