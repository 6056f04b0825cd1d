"""On a GPU: the run of the CPU, resumed to the bit, in bf16, and after it ran out of memory. Skipped without one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import prompt_rows, tiny_causal, tiny_t5, tiny_tokenizer
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from bondlm import BONDConfig, BONDTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

TOKENIZER = tiny_tokenizer()
MODELS: dict[str, Callable[..., Any]] = {"full": tiny_causal, "lora": tiny_causal, "t5": tiny_t5}


def low_ids(completion_ids: list[list[int]]) -> list[float]:
    return [sum(t < 100 for t in ids) / len(ids) + 1e-3 * sum(ids) / 300 for ids in completion_ids]


def trainer(folder: Path, kind: str = "full", **settings: Any) -> BONDTrainer:
    """A tiny model, a seventh of whose tokens end a completion."""
    model = MODELS[kind](TOKENIZER)
    model.generation_config.eos_token_id = list(range(2, 300, 7))
    small: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "max_completion_length": 12}
    small |= {"learning_rate": 1e-3, "eta": 0.2, "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no"}
    config = BONDConfig(output_dir=str(folder), disable_tqdm=True, **small | settings)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return BONDTrainer(
        model,
        low_ids,
        config,
        train_dataset=prompt_rows(16),
        processing_class=TOKENIZER,
        peft_config=lora if kind == "lora" else None,
    )


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def texts(row: dict[str, Any]) -> list[str]:
    return [completion["text"] for role in ("policy", "anchor") for completion in row[role]]


def weights(made: BONDTrainer) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in made.roles.model.named_parameters()}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_the_run_of_the_cpu(kind: str, offload: bool, tmp_path: Path) -> None:
    """In fp32 with plain SGD: the same samples, and the weights to rounding."""
    settings: dict[str, Any] = {"optim": "sgd", "gamma": 0.5, "num_logged_samples": 4}
    if offload:
        if kind == "lora":
            pytest.skip("an adapter cannot be offloaded")
        settings["offload_anchor"] = True
    ended, samples = {}, {}
    for name in ("cpu", "gpu"):
        made = trainer(tmp_path / name, kind, use_cpu=name == "cpu", **settings)
        made.train()
        ended[name] = weights(made)
        samples[name] = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_bytes().splitlines()]
    assert [texts(row) for row in samples["gpu"]] == [texts(row) for row in samples["cpu"]]
    for name, weight in ended["cpu"].items():
        torch.testing.assert_close(ended["gpu"][name], weight, atol=2e-5, rtol=1e-3)
    start = weights(trainer(tmp_path / "start", kind, use_cpu=True))
    moved = max(float((ended["cpu"][name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-4  # and not because nothing was learned
    for mine, theirs in zip(logged(tmp_path / "gpu"), logged(tmp_path / "cpu"), strict=True):
        for name in ("loss", "reward", "kl"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_resuming_equals_never_stopping(kind: str, mixed: bool, tmp_path: Path) -> None:
    settings = {"bf16": mixed, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = trainer(tmp_path / "whole", kind, **settings)
    whole.train()
    cut = trainer(tmp_path / "cut", kind, **settings | {"max_steps": 2})
    cut.train()
    resumed = trainer(tmp_path / "cut", kind, **settings)
    resumed.train(resume_from_checkpoint=True)
    expected, got = weights(whole), weights(resumed)
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("kind", MODELS)
def test_in_mixed_precision_the_sampled_distribution_is_the_learned_one(kind: str, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", kind, bf16=True, max_steps=10)
    start = weights(made)
    made.train()
    rows = [row for row in logged(tmp_path / "run") if "loss" in row]
    assert len(rows) == 10
    for row in rows:
        assert math.isfinite(row["loss"])
        assert row["sampling/sampling_logp_difference/mean"] < 0.05
    ended = weights(made)
    assert all(weight.dtype == torch.float32 for weight in ended.values())
    assert max(float((ended[name] - start[name]).abs().max()) for name in start) > 1e-4


def test_out_of_memory_halves_the_rows(tmp_path: Path) -> None:
    """A real one: the allocator may have a little more than the model has."""
    config = Qwen2Config(
        **{"vocab_size": len(TOKENIZER), "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8},
        **{"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096},
    )
    torch.manual_seed(0)
    from bondlm.engines.local.engine import TransformersEngine
    from bondlm.models.roles import Roles

    model = Qwen2ForCausalLM(config).eval().cuda()
    prompts = [[5 + i] * 512 for i in range(16)]

    def draw(max_rows: int) -> tuple[list[list[int]], TransformersEngine]:
        engine = TransformersEngine(Roles(model).use, eos_ids=[2], pad_id=0, max_rows=max_rows)
        rows = engine.generate(prompts, 8, role="policy", max_new_tokens=24, seeds=list(range(16)))
        return [c.ids for row in rows for c in row], engine

    expected, _ = draw(16)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600 * 2**20) / total)
    try:
        with pytest.warns(UserWarning, match=r"out of memory.*128 rows"):
            samples, engine = draw(128)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert samples == expected
    assert engine._graphs.wanted
