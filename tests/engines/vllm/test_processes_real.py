"""Two gloo processes and a real vLLM server on the CPU (`make test-vllm`): the mathematics of one process.

This file comes before test_real.py, whose last test takes a server's weights away.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.launch import check, outcome, run_tiny
from safetensors.torch import load_file

from bondlm.engines.agreement import GAP_METRIC
from bondlm.engines.vllm.server import LocalServer
from engines.vllm.helpers import PYTHON

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="BONDLM_VLLM_PYTHON names no interpreter with vLLM: make test-vllm"),
]


def difference(one: Path, two: Path, first: str, second: str) -> torch.Tensor:
    ours, theirs = load_file(one / first), load_file(two / second)
    return torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in theirs])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_processes_are_one(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """DDP and FSDP2: the same weights after two steps as of one process, and the same evaluation."""
    model, fixture = (
        (request.getfixturevalue("base"), "server")
        if kind == "lora"
        else (
            request.getfixturevalue("tied"),
            "whole_server",
        )
    )
    server: LocalServer = request.getfixturevalue(fixture)
    job: dict[str, Any] = {"model": model, "lora": kind == "lora", "engine": "vllm", "vllm_base_url": server.url}
    job |= {"max_steps": 2, "learning_rate": 0.1, "rows": 6}
    one = tmp_path / "one"
    check(run_tiny(one, 1, **job, per_device_train_batch_size=4))
    moved = float(difference(one, one, "policy.safetensors", "anchor.safetensors").mean())
    measured = json.loads((one / "eval_metrics.json").read_text())
    for name, more in (("ddp", {}), ("fsdp2", {"sharded": True})):
        two = tmp_path / name
        check(run_tiny(two, 2, **job, per_device_train_batch_size=2, **more))
        for file in ("policy.safetensors", "anchor.safetensors"):
            gap = difference(one, two, file, file)
            assert float(gap.max()) < 5e-6, name
            assert float(gap.mean()) < 1e-4 * moved, name
        metrics = json.loads((two / "eval_metrics.json").read_text())
        for key in ("eval_reward", "eval_win_rate", "eval_kl"):
            assert metrics[key] == pytest.approx(measured[key], abs=1e-4), name
        assert max(row[GAP_METRIC] for row in outcome(two) if GAP_METRIC in row) < 1e-3, name
