"""Examples run as their readers run them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_tabular_study_runs_and_judges_every_claim(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "examples/tabular_study.py", "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for experiment in ("X1", "X2", "X3", "X5", "X6", "X8"):
        assert any(line.startswith(f"{experiment}  ") for line in done.stdout.splitlines())
    assert (tmp_path / "figure.png").stat().st_size > 50_000
    # Even a tenth of the steps brings the policy towards Best-of-8, and the exact rows are exact.
    assert "-0.494    -0.500" in done.stdout
    assert "holds    3/3  mean two-level reward" in done.stdout


def slurm(folder: Path, srun: str) -> dict[str, str]:
    """An environment with programs of Slurm's names that write down how they were called."""
    programs = {"scontrol": f'echo "scontrol $@" >> {folder}/called\necho first-machine', "srun": srun}
    programs["accelerate"] = f'echo "accelerate $@" >> {folder}/called'
    for name, code in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "m[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
    return os.environ | job | {"SLURM_NODEID": "1", "PATH": f"{folder}:{os.environ['PATH']}"}


SCRIPT = ["bash", str(ROOT / "examples/slurm/train.sbatch"), "run.yaml"]


def test_the_job_script_starts_a_process_on_each_gpu(tmp_path: Path) -> None:
    environment = slurm(tmp_path, 'shift; exec "$@"')
    subprocess.run([*SCRIPT, "zero3", "--engine", "vllm"], env=environment, check=True, timeout=60)
    *_, call = (tmp_path / "called").read_text().splitlines()
    assert call == (
        "accelerate launch --config_file examples/accelerate/zero3.yaml --num_machines 2 --num_processes 16 "
        "--machine_rank 1 --main_process_ip first-machine --main_process_port 29500 -m bondlm train --config run.yaml "
        "--engine vllm"
    )
    subprocess.run(SCRIPT, env=environment, check=True, timeout=60)
    assert "accelerate/ddp.yaml" in (tmp_path / "called").read_text().splitlines()[-1]
    for way in ("ddp", "fsdp2", "zero2", "zero3"):
        assert (ROOT / f"examples/accelerate/{way}.yaml").is_file()


def test_a_job_whose_time_is_up_queues_again_when_it_has_saved(tmp_path: Path) -> None:
    """The signal goes to the job's steps: srun itself answers it by killing them."""
    saves = f"trap 'sleep 0.3; echo saved >> {tmp_path}/called; exit 1' TERM; touch {tmp_path}/runs"
    step = f'bash -c "{saves}; while true; do sleep 0.05; done" & echo $! > {tmp_path}/step'
    environment = slurm(tmp_path, f"{step}\ntrap 'kill -KILL $(cat {tmp_path}/step)' TERM\nwait $!\nwait $!")
    (tmp_path / "scancel").write_text(
        f'#!/bin/bash\n[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat {tmp_path}/step)\n'
    )
    (tmp_path / "scancel").chmod(0o755)
    job = subprocess.Popen(SCRIPT, env=environment)
    end = time.monotonic() + 60
    while not (tmp_path / "runs").exists() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.2)  # until the script waits
    job.terminate()
    job.wait(60)
    assert (tmp_path / "called").read_text().splitlines()[-2:] == ["saved", "scontrol requeue 7"]
