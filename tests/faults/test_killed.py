"""SIGKILL at any instant (D1, D2, D12 of the fault matrix): the same command continues, and nothing shows in the end.

`make soak` does it a hundred times. Children are forked after the imports, so that a kill falls into the work.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from cli.helpers import write_job

from faults.children import start, wait

KILLS = int(os.environ.get("BONDLM_KILLS", "6"))
STEPS = 12


def job(folder: Path) -> Path:
    folder.mkdir()
    return write_job(folder, max_steps=STEPS, save_steps=1, num_logged_samples=4, eval_dataset=None)


def outcome(folder: Path) -> tuple[bytes, bytes, list[dict[str, float]], str]:
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    kept = ("step", "loss", "reward", "kl", "anchor/distance", "grad_norm", "learning_rate")
    steps = [{name: row[name] for name in kept if name in row} for row in rows if "loss" in row]
    newest = run / f"checkpoint-{STEPS}"
    samples = (run / "samples.jsonl").read_text()
    adapter, anchor = ((newest / name).read_bytes() for name in ("adapter_model.safetensors", "anchor.safetensors"))
    return adapter, anchor, steps, samples


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(tmp_path: Path) -> None:
    straight, killed = job(tmp_path / "straight"), job(tmp_path / "killed")
    pid = start(straight)
    began = time.monotonic()
    assert wait(pid, 300) == 0
    whole = time.monotonic() - began
    instants = random.Random(3)
    kills = 0
    while kills < KILLS:
        pid = start(killed)
        code = wait(pid, instants.uniform(0.1, 0.9) * whole)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        else:
            assert code == 0
            assert outcome(killed.parent) == outcome(straight.parent)
            killed = job(tmp_path / f"killed-{len(list(tmp_path.iterdir()))}")
    assert wait(start(killed), 300) == 0
    adapter, anchor, steps, samples = outcome(killed.parent)
    expected = outcome(straight.parent)
    assert adapter == expected[0]
    assert anchor == expected[1]
    assert steps == expected[2]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert samples == expected[3]  # no prompt is lost or trained twice
