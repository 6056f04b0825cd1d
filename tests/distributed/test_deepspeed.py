"""DeepSpeed's ZeRO-2 and ZeRO-3 with two gloo processes on the CPU, started by `accelerate launch` with our configs.

`make test-deepspeed` installs what it needs. `DS_ACCELERATOR=cpu` tells DeepSpeed what it would find out by itself, and
`ddp_backend: gloo` (in `run_tiny.py`) tells accelerate what it expects of a GPU.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.vllm.stub import Stub, serving
from faults.test_security import Hostile
from safetensors.torch import load_file
from tiny import tiny_causal, tiny_tokenizer
from trainer.helpers import lora as lora_config
from transformers import AutoModelForCausalLM

from bondlm.models.adapters import wrap_adapter
from bondlm.runs.manifest import MANIFEST_FILE, fault, seal
from distributed.launch import check, launch_tiny, outcome, run_tiny
from distributed.test_fsdp import moved, residuals

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: make test-deepspeed"),
]
STAGES = [2, 3]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def run_zero(out: Path, stage: int, **job: Any) -> Any:
    return launch_tiny(out, 2, config=f"zero{stage}.yaml", timeout=400, **job)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a job without DeepSpeed, once for all tests of this file."""
    done: dict[str, Path] = {}

    def run(name: str, processes: int, **job: Any) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp(name) / "run"
            check(run_tiny(folder, processes, timeout=400, kind="causal", **job))
            done[name] = folder
        return done[name]

    return run


@pytest.mark.parametrize(("stage", "lora"), [(2, True), (2, False), (3, True), (3, False)])
def test_vllm_is_given_the_weights_of_all_processes(stage: int, lora: bool, tmp_path: Path) -> None:
    """A stub server draws for both: the same samples as for one process, so the same weights."""
    job: dict[str, Any] = {"kind": "causal", "lora": lora, "engine": "vllm", "max_steps": 2}
    model = tiny_causal(tiny_tokenizer())
    with serving(Stub(wrap_adapter(model, lora_config()) if lora else model, list(range(2, 300, 7)))) as stub:
        check(run_tiny(tmp_path / "one", 1, **job, vllm_base_url=stub.url, per_device_train_batch_size=4))
        asked = len(stub.drawn())
        check(run_zero(tmp_path / "two", stage, **job, vllm_base_url=stub.url, per_device_train_batch_size=2))
    assert len(stub.drawn()) == 2 * asked > 0
    for file in ("policy.safetensors", "anchor.safetensors"):
        gap = residuals(tmp_path / "one", tmp_path / "two", file)
        assert float(gap.abs().max()) < 2e-6
        assert float(gap.abs().mean()) < 1e-4 * moved(tmp_path / "one")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_processes_are_one(lora: bool, stage: int, baseline: Any, tmp_path: Path) -> None:
    job: dict[str, Any] = {"lora": lora} | ({} if lora else {"average_weights": 0.5})
    one = baseline(f"one-{lora}", 1, **job, per_device_train_batch_size=4)
    two = tmp_path / "two"
    limit = {} if lora else {"max_tokens_per_micro_batch": 77}  # now and then one process alone has more
    check(run_zero(two, stage, kind="causal", **job, **limit, per_device_train_batch_size=2))
    for file in ("policy.safetensors", "anchor.safetensors"):
        gap = residuals(one, two, file)
        assert float(gap.abs().max()) < 2e-6
        assert float(gap.abs().mean()) < 1e-4 * moved(one)
    rows = [[row for row in outcome(folder) if "loss" in row] for folder in (one, two)]
    for single, double in zip(*rows, strict=True):
        for key in ("anchor/distance", "anchor/gap_closed", "anchor/kl", "reward", "grad_norm"):
            assert double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-4)
    # What it saved is a standard folder, of the policy alone.
    policy = load_file(two / "policy.safetensors")
    if lora:
        saved = load_file(two / "adapter_model.safetensors")
        saved = {name.replace(".weight", ".default.weight"): weights for name, weights in saved.items()}
    else:
        saved = dict(AutoModelForCausalLM.from_pretrained(two).named_parameters())
    assert saved
    assert all(torch.equal(weights, policy[name]) for name, weights in saved.items())
    parts = [json.loads((two / f"anchor_part_{rank}.json").read_text()) for rank in range(2)]
    whole = sum(tensor.numel() for tensor in load_file(two / "anchor.safetensors").values())
    assert sum(parts) == (whole if stage == 3 else 2 * whole)  # ZeRO-2 leaves weights whole, and the anchor
    assert max(parts) < 0.6 * whole or stage == 2


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_that_of_ddp(stage: int, baseline: Any, tmp_path: Path) -> None:
    ddp = baseline("ddp-bf16", 2, bf16=True, per_device_train_batch_size=2)
    check(run_zero(tmp_path / "zero", stage, precision="bf16", kind="causal", per_device_train_batch_size=2))
    for file in ("policy.safetensors", "anchor.safetensors"):
        gap = residuals(ddp, tmp_path / "zero", file)
        assert float(gap.abs().max()) < 2e-6
        assert float(gap.abs().mean()) < 1e-4 * moved(ddp)


BOND = {"objective": "bond", "n": 4, "num_anchor_samples": 3}
KEPT: dict[int, dict[str, Any]] = {
    2: {"kind": "causal", "lora": True, "average_weights": 0.5, **BOND},
    3: {"kind": "causal", "average_weights": 0.5},
}
STATE = ("*.safetensors", "*.pt", "*.pth", "data.json")


def state_of(checkpoint: Path) -> dict[str, bytes]:
    found = [path for pattern in STATE for path in checkpoint.rglob(pattern)]
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in found}


def optimizer_of(checkpoint: Path, rank: int) -> str:
    """The moments and step numbers of one process, as a text."""
    (path,) = checkpoint.rglob(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]  # our own file
    return str(state["base_optimizer_state"] if "base_optimizer_state" in state else state["optimizer_state_dict"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_moves_nothing_and_resume_is_exact(stage: int, tmp_path: Path) -> None:
    job = KEPT[stage] | {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1, "rows": 20, "max_steps": 4}
    job |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    check(run_zero(straight, stage, **job, nan_rank=1, nan_step=2))  # in the first of two backward passes, on one rank
    assert [row["skipped_steps"] for row in outcome(straight) if "loss" in row] == [0, 1, 0, 0]
    first, second = straight / "checkpoint-1", straight / "checkpoint-2"
    weights = ["anchor.safetensors", "adapter_model.safetensors" if "lora" in job else "model.safetensors"]
    for name in weights:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    for rank in range(2):
        assert optimizer_of(first, rank) == optimizer_of(second, rank)
    assert all((second / name).read_bytes() != (straight / "checkpoint-3" / name).read_bytes() for name in weights)

    shutil.copytree(straight, stopped)
    for step in (3, 4):
        shutil.rmtree(stopped / f"checkpoint-{step}")
    check(run_zero(stopped, stage, **job, resume=True))
    names, again = state_of(straight / "checkpoint-4"), state_of(stopped / "checkpoint-4")
    assert {Path(name).name for name in names} >= {*weights, "rng_state_1.pth", "scheduler.pt"}
    assert any("optim_states" in name for name in names)
    assert names.keys() == again.keys()
    assert [name for name in names if names[name] != again[name]] == []


def test_x1_a_pickled_checkpoint_is_not_run(tmp_path: Path) -> None:
    """Also where the stranger has sealed it himself: DeepSpeed alone would run it."""
    job: dict[str, Any] = {"kind": "causal", "per_device_train_batch_size": 2, "save_strategy": "steps"}
    job |= {"save_steps": 1, "max_steps": 1}
    check(run_zero(tmp_path / "run", 2, **job))
    marker, checkpoint = tmp_path / "marker", tmp_path / "run" / "checkpoint-1"
    for path in checkpoint.rglob("*_states.pt"):
        torch.save(Hostile(marker), path)
    (checkpoint / MANIFEST_FILE).unlink()
    seal(checkpoint)
    assert fault(checkpoint) is None
    done = run_zero(tmp_path / "run", 2, **job | {"max_steps": 2}, resume=True)
    assert done.returncode != 0
    assert "Weights only load failed" in done.stderr
    assert not marker.exists()
