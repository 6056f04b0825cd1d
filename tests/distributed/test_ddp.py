"""Two processes with gloo on the CPU do the mathematics of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distributed.launch import check, run_tiny

JOBS: dict[
    str, tuple[dict[str, Any], int, int, int]
] = {  # settings, batch of one process, of each of two, accumulation
    "lora": ({"kind": "causal", "lora": True}, 4, 2, 1),
    "full": ({"kind": "causal"}, 4, 2, 1),
    "t5, accumulated": ({"kind": "t5"}, 4, 1, 2),
    "rloo": (
        {"kind": "causal", "lora": True, "objective": "rloo", "anchor": "periodic", "anchor_update_every": 2},
        4,
        2,
        1,
    ),
    "learned quantile": ({"kind": "causal", "objective": "bond", "n": 3, "quantile": "learned"}, 4, 2, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_are_one(name: str, tmp_path: Path) -> None:
    job, one, each, accumulate = JOBS[name]
    check(run_tiny(tmp_path / "one", 1, **job, per_device_train_batch_size=one))
    settings = {"per_device_train_batch_size": each, "gradient_accumulation_steps": accumulate}
    check(run_tiny(tmp_path / "two", 2, **job, **settings))
    policy, anchor = (load_file(tmp_path / "one" / f"{name}.safetensors") for name in ("policy", "anchor"))
    moved = float(torch.cat([(policy[name] - anchor[name]).abs().flatten() for name in anchor]).mean())
    for file in ("policy.safetensors", "anchor.safetensors"):
        single, double = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert single.keys() == double.keys()
        residuals = torch.cat([(double[n] - single[n]).flatten() for n in single])
        assert float(residuals.abs().max()) < 2e-6
        assert float(residuals.abs().mean()) < 1e-4 * moved
    metrics = [json.loads((tmp_path / folder / "eval_metrics.json").read_text()) for folder in ("one", "two")]
    for key in ("eval_reward", "eval_win_rate", "eval_kl", "eval_effective_n"):
        assert metrics[1][key] == pytest.approx(metrics[0][key], abs=1e-4)
    logs = [
        [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_bytes().splitlines()]
        for folder in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1])  # one process writes, not two
    for single_row, double_row in zip(*logs, strict=True):
        for key in ("reward", "anchor/reward", "kl", "anchor/kl", "grad_norm"):
            if key in single_row:
                assert double_row[key] == pytest.approx(single_row[key], rel=1e-3, abs=1e-4)
