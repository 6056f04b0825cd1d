"""FSDP2 with two gloo processes on the CPU: the mathematics of one process, a sharded anchor, exact resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distributed.launch import check, outcome, run_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def residuals(one: Path, two: Path, file: str) -> torch.Tensor:
    first, second = load_file(one / file), load_file(two / file)
    assert first.keys() == second.keys()
    return torch.cat([(second[name] - first[name]).flatten() for name in first])


def moved(one: Path) -> float:
    """Mean distance of the policy from its anchor: what a residual is small against."""
    policy, anchor = load_file(one / "policy.safetensors"), load_file(one / "anchor.safetensors")
    return float(torch.cat([(policy[name] - anchor[name]).abs().flatten() for name in anchor]).mean())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_sharded_processes_are_one(lora: bool, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    job: dict[str, Any] = {"kind": "causal", "lora": lora} | ({} if lora else {"average_weights": 0.5})
    check(run_tiny(one, 1, **job, per_device_train_batch_size=4))
    # Here and there one of the processes has more tokens than that, and the other one not.
    limit = {} if lora else {"max_tokens_per_micro_batch": 77}
    check(run_tiny(two, 2, **job, **limit, per_device_train_batch_size=2, sharded=True))
    for file in ("policy.safetensors", "anchor.safetensors"):
        gap = residuals(one, two, file)
        assert float(gap.abs().max()) < 2e-6
        assert float(gap.abs().mean()) < 1e-4 * moved(one)
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


def moments(path: Path) -> dict[str, dict[str, Any]]:
    state = torch.load(path, weights_only=True)["state"]
    return {str(name): {key: value.tolist() for key, value in each.items()} for name, each in state.items()}


BOND_K = {"objective": "bond", "n": 4, "num_anchor_samples": 3}
RESUMED: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "causal", "average_weights": 0.5},
    "ddp-bond-lora-4": {"kind": "causal", "lora": True, "gradient_accumulation_steps": 4, **BOND_K},
    "ddp-t5": {"kind": "t5"},
    "fsdp2": {"kind": "causal", "sharded": True, "average_weights": 0.5},
    "fsdp2-bond-lora-4": {"kind": "causal", "lora": True, "sharded": True, "gradient_accumulation_steps": 4, **BOND_K},
}


KEYS = ("step", "loss", "reward", "anchor/kl", "grad_norm")


@pytest.mark.parametrize("case", RESUMED)
def test_d9_resume_is_exact(case: str, tmp_path: Path) -> None:
    """All files of the last checkpoint that hold state, byte for byte."""
    job = RESUMED[case] | {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1, "rows": 20}
    job |= {"per_device_train_batch_size": 1 if "gradient_accumulation_steps" in job else 2, "logging_steps": 3}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    check(run_tiny(straight, 2, **job, max_steps=4))
    shutil.copytree(straight, stopped)
    for step in (3, 4):
        shutil.rmtree(stopped / f"checkpoint-{step}")
    check(run_tiny(stopped, 2, **job, max_steps=4, resume=True))
    names = {path.relative_to(straight) for path in (straight / "checkpoint-4").rglob("*") if path.is_file()}
    assert {path.name for path in names} >= {"anchor.safetensors", "rng_state_1.pth", "means.json"}
    assert any(path.name.startswith("optimizer.") for path in names)
    for name in names:
        # Times are metrics, and logged in trainer_state.json; PEFT writes a set's names in any order.
        if name.name not in ("trainer_state.json", "manifest.json", "means.json", "adapter_config.json"):
            one, two = straight / name, stopped / name
            same = one.read_bytes() == two.read_bytes()
            # FSDP's optimizer comes back with its settings in another order: there its tensors must be the same.
            assert same or (name.name == "optimizer.bin" and moments(one) == moments(two) != {}), name
    rows = [[row for row in outcome(folder) if "loss" in row] for folder in (straight, stopped)]
    assert [row["step"] for row in rows[0]] == [3, 4]
    for one, two in zip(*rows, strict=True):
        assert [one[key] for key in KEYS] == [two[key] for key in KEYS]


def test_no_process_holds_a_whole_anchor(tmp_path: Path) -> None:
    out = tmp_path / "run"
    check(run_tiny(out, 2, kind="causal", per_device_train_batch_size=2, sharded=True))
    whole = sum(tensor.numel() for tensor in load_file(out / "anchor.safetensors").values())
    parts = [json.loads((out / f"anchor_part_{rank}.json").read_text()) for rank in range(2)]
    assert sum(parts) == whole
    assert max(parts) < 0.6 * whole
