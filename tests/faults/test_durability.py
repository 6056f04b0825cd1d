"""Rows D1 to D8 and D12 to D15 of the fault matrix on one process: whole or absent, and never afresh by accident."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bondlm.cli import main
from bondlm.errors import CheckpointError
from bondlm.models.anchor import Anchor
from bondlm.runs import manifest
from bondlm.runs.manifest import MANIFEST_FILE, fault, newest_checkpoint, remove_older
from bondlm.trainer import BONDTrainer
from bondlm.training import callbacks, logs
from bondlm.training.step import Step
from faults.children import job, kill, outcome, said, start, train, wait, wrap


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


# -- D1, D2: killed


def count_writes(run: Path, at: int, tell: Path) -> None:
    """SIGKILL right before the `at`-th time that a checkpoint's file is opened for writing, renamed or removed."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            return
        if not str(args[0]).startswith(str(run / "checkpoint")):
            return
        if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen += 1
        if seen == at:
            kill()
        if at == 0:
            tell.write_text(str(seen))

    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def num_writes(tmp_path_factory: pytest.TempPathFactory) -> int:
    config = job(tmp_path_factory.mktemp("count") / "job", save_total_limit=2)
    tell = config.parent / "tell"
    assert train(config, lambda: count_writes(config.parent / "run", 0, tell)) == 0
    return int(tell.read_text())


def killed_at_write(tmp_path: Path, straight: Path, at: int) -> None:
    config = job(tmp_path / f"killed-{at}", save_total_limit=2)
    code = train(config, lambda: count_writes(config.parent / "run", at, config))
    assert code == -9, (at, said(config))
    assert train(config) == 0, (at, said(config))
    assert outcome(config) == outcome(straight)
    assert sum(fault(path) is None for path in (config.parent / "run").glob("checkpoint-*")) == 2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_d1_killed_during_save(share: float, num_writes: int, straight: Path, tmp_path: Path) -> None:
    """Also in the first save, when there is nothing yet to fall back to."""
    assert num_writes > 20
    killed_at_write(tmp_path, straight, 1 + round(share * (num_writes - 1)))


@pytest.mark.slow
@pytest.mark.timeout(1500)  # dozens of runs, one after another
def test_d1_killed_before_writes(num_writes: int, straight: Path, tmp_path: Path) -> None:
    """Every fourth one; every one in `make soak`."""
    for at in range(1, num_writes + 1, 1 if "BONDLM_KILLS" in os.environ else 4):
        killed_at_write(tmp_path, straight, at)


MOMENTS: dict[str, tuple[Any, str]] = {
    "sampling": (Step, "score"),
    "backward": (BONDTrainer, "training_step"),
    "optimizer": (torch.optim.AdamW, "step"),
    "anchor": (Anchor, "update"),
    "log": (logs, "append_jsonl"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_d2_killed_mid_step(moment: str, straight: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "job")
    owner, name = MOMENTS[moment]
    assert train(config, lambda: wrap(owner, name, 3 if moment == "log" else 2, kill)) == -9
    with (config.parent / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # torn
    assert train(config) == 0, said(config)
    assert outcome(config) == outcome(straight)
    assert [row["step"] for row in outcome(config)["steps"]] == [1, 2, 3]


# -- D3, D4: the disk


@pytest.mark.parametrize("limit", [3500, 8000])
def test_d3_disk_full_on_save(limit: int, straight: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "job", num_logged_samples=0)
    run = config.parent / "run"

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert train(config, lambda: wrap(callbacks, "seal", 1, fill)) == 7, said(config)
    assert re.search(rf"disk of {run}.* \d+ bytes", said(config))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert fault(run / "checkpoint-1") is None
    assert train(config) == 0
    mine, theirs = outcome(config), outcome(straight)
    assert {k: v for k, v in mine.items() if k != "samples"} == {k: v for k, v in theirs.items() if k != "samples"}


def test_d4_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    config = job(tmp_path / "job", output_dir="/proc/nowhere")  # chmod would not stop root
    assert train(config) == 2
    assert "output_dir='/proc/nowhere'" in said(config)


def test_d4_a_folder_that_vanishes(tmp_path: Path) -> None:
    config = job(tmp_path / "job")
    run = config.parent / "run"
    assert train(config, lambda: wrap(Anchor, "update", 2, lambda: run.rename(run.with_name("away")))) == 6
    assert re.search(f"output_dir='{run}'.*step 1", said(config))
    assert not run.exists()  # no second life in another place
    run.with_name("away").rename(run)
    assert train(config) == 0
    assert outcome(config)["newest"] == "checkpoint-3"


# -- D5 to D8: what lies there is not what was sealed


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "one byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "all but one": lambda data: data[:-1],
}


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 4]) + data[len(data) // 3 + 1 :]


def rejected_everywhere(run: Path, change: Callable[[bytes], bytes]) -> None:
    """Each file of the newest checkpoint in turn; the one before is taken, and the file is named."""
    files = [path for path in (run / "checkpoint-3").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"anchor.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", MANIFEST_FILE}
    for path in files:
        data = path.read_bytes()
        path.write_bytes(change(data))
        taken, rejected = newest_checkpoint(run)
        assert taken == run / "checkpoint-2", path
        assert path.name in rejected[0] or path.name == MANIFEST_FILE  # a hash in it may be what has changed
        path.write_bytes(data)
    assert newest_checkpoint(run) == (run / "checkpoint-3", [])


@pytest.mark.parametrize("cut", CUTS)
def test_d5_truncated_file_is_rejected(cut: str, copy: Path) -> None:
    rejected_everywhere(copy.parent / "run", CUTS[cut])


def test_d5_none_left_is_no_fresh_start(copy: Path, straight: Path) -> None:
    run = copy.parent / "run"
    for step in (2, 3):
        anchor = run / f"checkpoint-{step}" / "anchor.safetensors"
        anchor.write_bytes(anchor.read_bytes()[:-1])
    assert train(copy) == 0
    for step in (2, 3):
        assert re.search(rf"checkpoint-{step}: anchor\.safetensors .*bytes", said(copy))
    assert outcome(copy) == outcome(straight)
    for path in run.glob("checkpoint-*"):
        (path / "anchor.safetensors").write_bytes(b"")
    before = (run / "metrics.jsonl").read_bytes()
    assert train(copy) == 6
    assert f"checkpoint of {run}" in said(copy)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_d5_damaged_ones_do_not_drive_out_the_good(copy: Path) -> None:
    """The two newest are damaged and the run goes on behind them: what it then writes must not be the oldest of all."""
    run = copy.parent / "run"
    (run / "checkpoint-3").rename(run / "checkpoint-8")
    (run / "checkpoint-8" / "anchor.safetensors").write_bytes(b"")
    shutil.copytree(run / "checkpoint-8", run / "checkpoint-9")
    assert train(copy, lambda: None, "--save_total_limit", "2") == 0, said(copy)
    assert [fault(run / f"checkpoint-{step}") is None for step in (2, 3)] == [True, True]
    assert newest_checkpoint(run)[0] == run / "checkpoint-3"


def test_d5_all_gone_is_no_fresh_start(copy: Path) -> None:
    run = copy.parent / "run"
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    before = (run / "metrics.jsonl").read_bytes()
    for more in ((), ("--resume", "never")):
        assert train(copy, lambda: None, *more) == 6
        assert ".sealed" in said(copy)
    assert (run / "metrics.jsonl").read_bytes() == before
    with pytest.raises(CheckpointError, match=r"\.sealed"):
        manifest.checkpoint_to_resume(run, True)
    (run / ".sealed").unlink()  # as the message says
    assert newest_checkpoint(run) == (None, [])


def test_d6_one_flipped_bit_is_rejected(copy: Path) -> None:
    rejected_everywhere(copy.parent / "run", flipped)


@pytest.mark.parametrize("name", ["../outside", "/{tmp}/outside"])
def test_d7_a_path_out_of_the_folder_is_not_read(name: str, copy: Path) -> None:
    path = copy.parent / "run" / "checkpoint-3"
    outside = path.parent / "outside"
    os.mkfifo(outside)  # whoever reads it waits for ever
    content = json.loads((path / MANIFEST_FILE).read_text())
    content["files"][name.format(tmp=path.parent)] = {"size": 0, "sha256": ""}
    (path / MANIFEST_FILE).write_text(json.dumps(content))
    assert re.search(f"{name.format(tmp=path.parent)}.*out of the folder", str(fault(path)))
    (path / MANIFEST_FILE).unlink()
    (path / MANIFEST_FILE).symlink_to(outside)
    assert re.search(f"{MANIFEST_FILE}.* link", str(fault(path)))


def test_d7_manifest_missing_or_a_file_too_many(copy: Path) -> None:
    run = copy.parent / "run"
    (run / "checkpoint-3" / "more.pt").touch()
    (run / "checkpoint-2" / MANIFEST_FILE).unlink()
    taken, rejected = newest_checkpoint(run)
    assert taken == run / "checkpoint-1"
    assert re.search(r"checkpoint-3: more\.pt ", rejected[0])
    assert re.search(f"checkpoint-2: .*{MANIFEST_FILE}", rejected[1])
    (run / "linked").symlink_to(run / "checkpoint-1")
    assert re.search("linked .* link", str(fault(run / "linked")))


def test_d8_stale_temp_folders_are_removed_and_said(copy: Path, straight: Path) -> None:
    run = copy.parent / "run"
    for name in ("checkpoint-2.tmp-99", "checkpoint-7"):  # a temporary one, and a save that was cut short
        (run / name).mkdir()
        (run / name / "optimizer.pt").write_bytes(b"half")
    (run / "checkpoint-best").mkdir()  # somebody's own
    assert train(copy) == 0
    for name in ("checkpoint-2.tmp-99", "checkpoint-7"):
        assert not (run / name).exists()
        assert f"removed {run / name}" in said(copy)
    assert (run / "checkpoint-best").is_dir()
    (run / "checkpoint-best").rmdir()
    assert outcome(copy) == outcome(straight)


@pytest.mark.parametrize("content", ["", "- a\n", "a: [", "\xff"], ids=["empty", "list", "torn", "binary"])
def test_d5_settings_that_cannot_be_read(content: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy.parent / "run"
    (run / "config.yaml").write_bytes(content.encode("latin-1"))
    assert main(["train", "--config", str(copy)]) == 6
    assert f"{run / 'config.yaml'}" in capsys.readouterr().err
    assert main(["eval", "--model", str(run)]) == 6


def test_d1_the_settings_are_written_whole(tmp_path: Path) -> None:
    """Killed right before the new file takes its place: the old one is there."""
    config = job(tmp_path / "job", max_steps=1)
    assert train(config) == 0
    before = (config.parent / "run" / "config.yaml").read_bytes()

    def kill_at_config() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            name = str(args[1 if event == "os.rename" else 0]) if args else ""
            if (
                event in ("open", "os.rename")
                and name.endswith("run/config.yaml")
                and (event != "open" or args[1] != "r")
            ):
                kill()

        sys.addaudithook(hook)

    assert train(config, kill_at_config, "--max_steps", "2") == -9, said(config)
    assert (config.parent / "run" / "config.yaml").read_bytes() == before
    assert train(config, lambda: None, "--max_steps", "2") == 0, said(config)


# -- D12 to D15


def test_d12_two_processes_on_one_run_folder(copy: Path, straight: Path) -> None:
    """The first is stopped in the middle of its step; then killed, and its lock with it."""
    first = start(copy, lambda: wrap(BONDTrainer, "training_step", 1, stop), "--max_steps", "4")
    os.waitpid(first, os.WUNTRACED)
    assert train(copy, lambda: None, "--max_steps", "4") == 6
    assert f"process {first} on {socket.gethostname()}" in said(copy)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert train(copy) == 0
    assert not (copy.parent / "run" / ".lock").exists()


def test_d13_an_explicit_checkpoint_that_is_absent(copy: Path) -> None:
    missing = copy.parent / "run" / "checkpoint-999"
    assert train(copy, lambda: None, "--resume", str(missing)) == 6
    assert f"resume='{missing}'" in said(copy)
    missing.mkdir()
    assert train(copy, lambda: None, "--resume", str(missing)) == 6
    assert re.search(f"checkpoint-999 .*{MANIFEST_FILE}", said(copy))


def test_d14_a_newer_format_is_refused_not_passed_over(copy: Path) -> None:
    path = copy.parent / "run" / "checkpoint-3" / MANIFEST_FILE
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    assert train(copy) == 6
    assert "format 2" in said(copy)


def test_d15_a_purge_that_fails_is_a_warning_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "no", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(manifest.shutil, "rmtree", refuse)
        with pytest.warns(UserWarning, match="checkpoint-1 "):
            remove_older(tmp_path, keep=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remove_older(tmp_path, keep=2, best=str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_d15_the_oldest_goes_only_when_the_newest_is_sealed(tmp_path: Path) -> None:
    config = job(tmp_path / "job", save_total_limit=2)
    run = config.parent / "run"
    pid = start(config, lambda: wrap(callbacks, "seal", 3, kill, after=False))
    assert wait(pid) == -9
    assert [fault(run / f"checkpoint-{step}") is None for step in (1, 2, 3)] == [True, True, False]
    assert train(config) == 0
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_d13_through_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"checkpoint-9 .*{MANIFEST_FILE}"):
        manifest.checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-9"))
    shutil.rmtree(tmp_path)
    with pytest.raises(CheckpointError, match=f"'{tmp_path}'.*resume_from_checkpoint"):
        manifest.checkpoint_to_resume(tmp_path, True)
