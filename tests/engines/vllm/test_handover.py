"""Weights through shared memory: where it has room, for this process alone, and gone with it."""

import gc
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_causal

from bondlm.engines import choose
from bondlm.engines.vllm.handover import SHARED, START, shared_folder
from bondlm.models.roles import Roles
from engines.vllm.helpers import TOKENIZER

HOLD = """
import sys, time
from pathlib import Path
from bondlm.engines.vllm.handover import shared_folder
folder = shared_folder(1, Path(sys.argv[1]))
(folder / "weights").write_bytes(b"x")
print(folder, flush=True)
if sys.argv[2] == "stay":
    time.sleep(60)
"""


def holder(shared: Path, then: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(shared), then], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_ours_alone_and_goes_with_its_process(tmp_path: Path) -> None:
    process, folder = holder(tmp_path, "end")
    assert process.wait(60) == 0
    assert folder.parent == tmp_path
    assert not folder.exists()
    mine = shared_folder(1, tmp_path)
    assert mine is not None
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700


def test_what_a_killed_process_left_is_removed_and_what_another_uses_is_not(tmp_path: Path) -> None:
    (alive, used), (killed, left) = holder(tmp_path, "stay"), holder(tmp_path, "stay")
    try:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(60)
        mine = shared_folder(1, tmp_path)
        assert {path for path in tmp_path.glob(f"{START}*")} == {mine, used}
        assert (used / "weights").is_file()
        assert not left.exists()
    finally:
        alive.kill()
        alive.wait()


def test_without_room_or_such_memory_there_is_none(tmp_path: Path) -> None:
    assert shared_folder(2**60, tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert shared_folder(1, tmp_path / "missing") is None


class Machines:
    """Two processes, and what the other one gathers."""

    size, rank = 2, 0

    def __init__(self, others: list[Any]) -> None:
        self.others = others

    def gather_objects(self, items: list[Any]) -> list[Any]:
        return items + (self.others or items)


HERE: list[Any] = []


@pytest.mark.parametrize(
    ("server", "others", "shared"),
    [("auto", HERE, True), ("external", HERE, False), ("auto", [("elsewhere", 7)], False)],
    ids=["ours", "another's", "two machines"],
)
def test_only_servers_of_ours_on_this_machine_are_given_weights_there(
    server: str, others: list[Any], shared: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, roles: Roles
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(choose, "shared_folder", lambda needed: asked.append(needed) or tmp_path)
    args: Any = SimpleNamespace(vllm_server=server)
    whole, both = Roles(tiny_causal(TOKENIZER)), Machines(others)
    assert choose.weights_folder(args, whole, both) == (tmp_path if shared else None)
    size = sum(p.numel() * p.element_size() for p in whole.model.parameters())
    assert asked == ([int(1.1 * size)] if shared else [])
    assert choose.weights_folder(args, roles, both) is None  # an adapter
    monkeypatch.setattr(choose, "host_memory", lambda: 4 * size)
    assert choose.weights_folder(args, whole, both) is None  # a container with little memory
    whole.autocast = torch.bfloat16
    choose.weights_folder(args, whole, both)
    assert asked == ([int(1.1 * size), int(0.55 * size)] if shared else [])
    del whole
    gc.collect()
    assert tmp_path.exists() != shared  # it goes with the trainer, not only with Python


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared memory here")
def test_this_machines_shared_memory() -> None:
    folder = shared_folder(1)
    assert folder is not None
    assert folder.parent == SHARED
