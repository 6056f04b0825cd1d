"""Two processes with gloo on the CPU do the mathematics of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.helpers import write_job
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bondlm.runs.manifest import fault
from distributed.launch import ROOT, check, outcome, run_tiny

JOBS: dict[
    str, tuple[dict[str, Any], int, int, int]
] = {  # settings, batch of one process, of each of two, accumulation
    "lora": ({"kind": "causal", "lora": True}, 4, 2, 1),
    "full": ({"kind": "causal"}, 4, 2, 1),
    "t5, accumulated": ({"kind": "t5"}, 4, 1, 2),
    "rloo": (
        {"kind": "causal", "lora": True, "objective": "rloo", "anchor": "periodic", "anchor_update_every": 2}
        | {"max_tokens_per_micro_batch": 77},
        4,
        2,
        1,
    ),
    "learned quantile": ({"kind": "causal", "objective": "bond", "n": 3, "quantile": "learned"}, 4, 2, 1),
    "adaptive strength": (
        {"kind": "causal", "objective": "self_bond", "n": 3, "num_samples": 3, "anchor": "fixed"}
        | {"adaptive_strength": True},
        4,
        2,
        1,
    ),
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
    assert ("bond/signal_factor" in logs[0][0]) == ("adaptive_strength" in job)
    for single_row, double_row in zip(*logs, strict=True):
        for key in ("reward", "anchor/reward", "kl", "anchor/kl", "grad_norm", "num_tokens", "bond/signal_factor"):
            if key in single_row:
                assert double_row[key] == pytest.approx(single_row[key], rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 3], ids=["one prompt each", "filled up"])
def test_two_processes_log_what_one_does(rows: int, tmp_path: Path) -> None:
    """Spread, extremes and counts too; a row that fills up the second process's last batch counts nowhere."""
    job: dict[str, Any] = {"kind": "causal", "rows": rows, "max_steps": 4, "max_skipped_frac": 0.9}
    job |= {"drops_first": True, "logging_steps": 2}
    check(run_tiny(tmp_path / "one", 1, **job, per_device_train_batch_size=2))
    check(run_tiny(tmp_path / "two", 2, **job, per_device_train_batch_size=1))
    one, two = ([row for row in outcome(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert one
    assert "characters" in one[0]  # of `log_metric`
    for single, double in zip(one, two, strict=True):
        timed = {name for name in single if name.startswith("time/") or name == "step_time"}
        assert single.keys() == double.keys()
        for name in single.keys() - timed - {"sampling/sampling_logp_difference/mean"}:
            value = single[name] if single[name] is None else pytest.approx(single[name], rel=1e-3, abs=1e-4)
            assert double[name] == value, name
        undefined = {"grad_norm", "rewards/reward/std"}  # of a skipped step; of one sample per step
        assert {name for name, value in single.items() if value is None} <= undefined


@pytest.mark.slow
@pytest.mark.parametrize(("sharded", "held_out"), [(False, 5), (True, 1)])
def test_an_evaluation_asks_the_rewards_once_about_each_answer(sharded: bool, held_out: int, tmp_path: Path) -> None:
    """Also where there are fewer prompts than processes."""
    job: dict[str, Any] = {"kind": "causal", "sharded": sharded, "held_out": held_out, "max_steps": 1}
    check(run_tiny(tmp_path / "one", 1, **job, per_device_train_batch_size=4))
    check(run_tiny(tmp_path / "two", 2, **job, per_device_train_batch_size=2))
    whole = json.loads((tmp_path / "one" / "asked_0.json").read_text())
    parts = [json.loads((tmp_path / "two" / f"asked_{rank}.json").read_text()) for rank in range(2)]
    assert len(whole) == held_out
    assert sorted(parts[0] + parts[1]) == whole
    one, two = (json.loads((tmp_path / folder / "eval_metrics.json").read_text()) for folder in ("one", "two"))
    for key in ("eval_reward", "eval_reward_low", "eval_reference_reward", "eval_win_rate", "eval_kl", "eval_kl_high"):
        assert two[key] == pytest.approx(one[key], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["on_epoch_begin", "on_step_begin", "on_step_end", "on_log", "on_save"])
def test_a_callback_of_one_process_stops_all_and_what_was_learned_is_saved(event: str, tmp_path: Path) -> None:
    """A limit of time, or a file, that only one process sees."""
    every = 4 if event == "on_step_end" else 2
    job: dict[str, Any] = {"max_steps": 5, "logging_steps": every, "save_strategy": "steps", "save_steps": every}
    job |= {"kind": "causal", "rows": 8, "stop_rank": 1, "stop": (2, event), "per_device_train_batch_size": 2}
    check(run_tiny(tmp_path / "out", 2, timeout=60, **job))
    steps = [2, 3] if event == "on_step_begin" else [2]  # a step that has begun is finished
    assert [row["step"] for row in outcome(tmp_path / "out") if "loss" in row] == steps
    assert fault(tmp_path / "out" / f"checkpoint-{steps[-1]}") is None


@pytest.mark.slow
def test_a_full_disk_of_the_main_process_is_said_by_all_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    job = {"kind": "causal", "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    done = run_tiny(tmp_path / "out", 2, timeout=60, disk_is_full=True, **job)
    assert done.returncode != 0
    assert "ResourceError: process 0: the disk of" in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_resumed_epoch_learns_from_no_prompt_twice(tmp_path: Path) -> None:
    """13 prompts, 8 a step: three of the second step's are the epoch's first again, and fill up."""
    job = {"kind": "causal", "rows": 13, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    check(run_tiny(whole, 2, **job, per_device_train_batch_size=4))
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoint-2")
    (stopped / "policy.safetensors").unlink()
    check(run_tiny(stopped, 2, **job, per_device_train_batch_size=4, resume=True))
    weights = [load_file(folder / "policy.safetensors") for folder in (whole, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_the_shipped_config_starts_two_processes_of_the_command(tmp_path: Path) -> None:
    config = write_job(tmp_path, max_steps=2, per_device_train_batch_size=2)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "examples/accelerate/ddp.yaml"), "-m", "bondlm", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command += ["--config", str(config)]
    check(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False))
    steps = [row for row in outcome(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]  # one process writes, not two
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_bytes().splitlines()]
    assert len(samples) > 0
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "run")
