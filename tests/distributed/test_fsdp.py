"""FSDP2 with two gloo processes on the CPU: the mathematics of one process, a sharded anchor, exact resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distributed.launch import check, run_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def residuals(one: Path, two: Path, file: str) -> torch.Tensor:
    first, second = load_file(one / file), load_file(two / file)
    assert first.keys() == second.keys()
    return torch.cat([(second[name] - first[name]).flatten() for name in first])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_sharded_processes_are_one(lora: bool, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    check(run_tiny(one, 1, kind="causal", lora=lora, per_device_train_batch_size=4))
    check(run_tiny(two, 2, kind="causal", lora=lora, per_device_train_batch_size=2, sharded=True))
    for file in ("policy.safetensors", "anchor.safetensors"):
        gap = residuals(one, two, file)
        assert float(gap.abs().max()) < 2e-6
        assert float(gap.mean().abs()) < 1e-8
    metrics = [json.loads((folder / "eval_metrics.json").read_text()) for folder in (one, two)]
    for key in ("eval_reward", "eval_win_rate", "eval_kl", "eval_effective_n"):
        assert metrics[1][key] == pytest.approx(metrics[0][key], abs=1e-4)
    rows = [[json.loads(row) for row in (folder / "metrics.jsonl").read_bytes().splitlines()] for folder in (one, two)]
    for single, double in zip(*rows, strict=True):
        for key in ("anchor/distance", "anchor/gap_closed", "anchor/kl", "reward", "grad_norm"):
            if key in single:
                assert double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_saved_folder_is_a_standard_one(lora: bool, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job: dict[str, Any] = {
        "kind": "causal",
        "lora": lora,
        "per_device_train_batch_size": 2,
        "sharded": True,
        "save_base": True,
    }
    check(run_tiny(out, 2, **job))
    policy = load_file(out / "policy.safetensors")
    if lora:
        files = {path.name for path in out.iterdir()}
        assert "adapter_model.safetensors" in files
        assert not {"anchor", "model.safetensors"} & files
        loaded: Any = AutoPeftModelForCausalLM.from_pretrained(out)
        mine = {n: p for n, p in loaded.named_parameters() if ".default." in n}
    else:
        mine = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    assert mine
    assert all(torch.equal(weights, policy[name]) for name, weights in mine.items())


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_d9_resume_is_exact(sharded: bool, tmp_path: Path) -> None:
    job: dict[str, Any] = {
        "kind": "causal",
        "per_device_train_batch_size": 2,
        "sharded": sharded,
        "optim": "adamw_torch",
    }
    job |= {"save_strategy": "steps", "save_steps": 1}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    check(run_tiny(straight, 2, **job, max_steps=4))
    check(run_tiny(stopped, 2, **job, max_steps=2))
    check(run_tiny(stopped, 2, **job, max_steps=4, resume=True))
    for file in ("policy.safetensors", "anchor.safetensors"):
        assert float(residuals(straight, stopped, file).abs().max()) == 0


def test_no_process_holds_a_whole_anchor(tmp_path: Path) -> None:
    out = tmp_path / "run"
    check(run_tiny(out, 2, kind="causal", per_device_train_batch_size=2, sharded=True))
    whole = sum(tensor.numel() for tensor in load_file(out / "anchor.safetensors").values())
    parts = [json.loads((out / f"anchor_part_{rank}.json").read_text()) for rank in range(2)]
    assert sum(parts) == whole
    assert max(parts) < 0.6 * whole
