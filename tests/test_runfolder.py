import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from bondlm.errors import CheckpointError, ConfigError
from bondlm.runfolder import LOCK_FILE, append_jsonl, drop_after, locked, plain

ODD = "a\u2028b\x85c\x0bd \U0001f600 \u00e9\n\ttab"


def dead_pid() -> int:
    process = multiprocessing.get_context("spawn").Process(target=len, args=([],))
    process.start()
    process.join()
    assert process.pid is not None
    return process.pid


def write_lock(folder: Path, pid: int, host: str | None = None) -> Path:
    path = folder / LOCK_FILE
    path.write_text(json.dumps({"pid": pid, "host": host or socket.gethostname()}))
    return path


def test_the_lock_names_its_owner_and_goes_with_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with locked(folder):
        assert json.loads((folder / LOCK_FILE).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    assert not (folder / LOCK_FILE).exists()
    with pytest.raises(ZeroDivisionError), locked(folder):
        raise ZeroDivisionError
    assert not (folder / LOCK_FILE).exists()


def test_a_live_process_keeps_its_folder(tmp_path: Path) -> None:
    parent = os.getppid()
    path = write_lock(tmp_path, parent)
    with (
        pytest.raises(CheckpointError, match=f"in use by process {parent} on {socket.gethostname()}"),
        locked(tmp_path),
    ):
        pytest.fail("two owners")
    assert path.exists()  # the refused one must not take the other's lock away


def test_a_process_of_another_user_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    write_lock(tmp_path, os.getpid() + 1)
    with pytest.raises(CheckpointError), locked(tmp_path):
        pytest.fail("two owners")


def test_another_host_cannot_be_asked(tmp_path: Path) -> None:
    write_lock(tmp_path, dead_pid(), "elsewhere")
    with pytest.raises(CheckpointError, match="on elsewhere"), locked(tmp_path):
        pytest.fail("two owners")


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    write_lock(tmp_path, dead_pid())
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", '{"pid": 1', "[]", '{"pid": null, "host": "x"}', "{}"])
def test_a_torn_lock_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("inside", [False, True], ids=["is a file", "lies in a file"])
def test_a_folder_that_cannot_be_is_a_config_error(tmp_path: Path, inside: bool) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ConfigError, match="output_dir="), locked(file / "run" if inside else file):
        pytest.fail("no folder")
    assert file.read_text() == "x"


def test_numbers_that_json_cannot_write_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row: dict[str, Any] = {"step": 1, "a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (-float("inf"), "x")}}
    append_jsonl(path, [row, {"step": 2, "text": ODD}])
    append_jsonl(path, [{"step": 3}])
    lines = path.read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"step": 1, "a": None, "b": [None, 1.5], "c": {"d": [None, "x"]}},
        {"step": 2, "text": ODD},
        {"step": 3},
    ]
    assert lines[-1] == ""
    assert plain(True) is True
    assert plain(3) == 3


@pytest.mark.parametrize(("step", "kept"), [(0, [0]), (2, [0, 2, 2]), (9, [0, 2, 2, 4])])
def test_drop_after_keeps_the_rows_up_to_a_step(tmp_path: Path, step: int, kept: list[int]) -> None:
    path = tmp_path / "samples.jsonl"
    append_jsonl(path, [{"step": s, "text": ODD} for s in (0, 2, 2, 4)])
    before = path.read_bytes()
    drop_after(path, step)
    assert before.startswith(path.read_bytes())
    rows = [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    assert rows == [{"step": s, "text": ODD} for s in kept]
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    append_jsonl(path, [{"step": 1, "text": ODD}])
    whole = path.read_bytes()
    append_jsonl(path, [{"step": 2, "text": ODD}])
    both = path.read_bytes()
    for cut in range(len(whole), len(both) - 1):  # in the middle of a character too
        path.write_bytes(both[:cut])
        drop_after(path, 5)
        assert path.read_bytes() == whole
    # Only its line end was lost: the row is whole.
    path.write_bytes(both[:-1])
    drop_after(path, 5)
    assert path.read_bytes() == both


def test_drop_after_without_a_file_makes_none(tmp_path: Path) -> None:
    drop_after(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())
