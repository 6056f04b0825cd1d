import errno
import gc
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bondlm.errors import CheckpointError, ConfigError
from bondlm.runs.folder import LOCK_FILE, OWNER_FILE, append_jsonl, drop_after, locked, plain, whole, write_whole

ODD = "a\u2028b\x85c\x0bd \U0001f600 \u00e9\n\ttab"


FORK = multiprocessing.get_context("fork")


def hold(folder: Path, taken: Any, seconds: float) -> None:
    with locked(folder):
        taken.set()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Any]:
    """Another process that holds the folder."""
    taken = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, taken, 60))
    process.start()
    assert taken.wait(10)
    yield process
    process.kill()
    process.join()


def test_the_lock_names_its_owner_and_goes_with_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with locked(folder):
        assert (folder / OWNER_FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert list(folder.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked(folder):
        raise ZeroDivisionError
    assert list(folder.iterdir()) == []


def test_a_live_process_keeps_its_folder_whatever_the_file_says(tmp_path: Path, holder: Any) -> None:
    with (
        pytest.raises(CheckpointError, match=f"process {holder.pid} on {socket.gethostname()}"),
        locked(tmp_path),
    ):
        pytest.fail("two owners")
    assert (tmp_path / LOCK_FILE).exists()  # the refused one must not take the other's lock away
    (tmp_path / OWNER_FILE).unlink()  # as it is for a moment after it was taken
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*another process"), locked(tmp_path):
        pytest.fail("two owners")


def test_the_lock_of_a_killed_process_is_nobodys(tmp_path: Path, holder: Any) -> None:
    holder.kill()
    holder.join()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        assert (tmp_path / OWNER_FILE).read_text().startswith(f"process {os.getpid()} ")


def test_a_forked_child_that_ends_does_not_take_the_lock_with_it(tmp_path: Path) -> None:
    """A worker of a data loader, say."""
    with locked(tmp_path):
        worker = FORK.Process(target=gc.collect)
        worker.start()
        worker.join()
        other = FORK.Process(target=hold, args=(tmp_path, FORK.Event(), 0))
        other.start()
        other.join()
        assert other.exitcode == 1  # refused


@pytest.mark.parametrize("content", ["", "process 1 on elsewhere", "\x00" * 2000])
def test_what_a_file_without_owner_says_does_not_matter(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    (tmp_path / OWNER_FILE).write_text(content)
    with locked(tmp_path):
        pass


def contend(folder: Path, start: Any, journal: int) -> None:
    start.wait(10)
    for _ in range(30):
        try:
            with locked(folder):
                os.write(journal, b"(")
                time.sleep(0.0005)
                os.write(journal, b")")
        except CheckpointError:
            time.sleep(0.0003)


def test_of_many_starters_one_has_the_folder_at_a_time(tmp_path: Path) -> None:
    """Each also removes the file that the next one may just have opened."""
    (tmp_path / LOCK_FILE).write_text("left behind")
    start, path = FORK.Barrier(4), tmp_path / "journal"
    journal = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    starters = [FORK.Process(target=contend, args=(tmp_path, start, journal)) for _ in range(4)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(30)
        assert starter.exitcode == 0
    text = path.read_text()
    assert text == "()" * (len(text) // 2)
    assert text


def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    with pytest.warns(UserWarning, match=f"{tmp_path}.*No locks available"), locked(tmp_path):
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
    path.write_bytes(before + b"null\n[1]\n")  # not written by a run
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


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.with_name("eval.json.tmp").write_text("half of an earlier one")
    write_whole(path, "old")
    with pytest.raises(ZeroDivisionError), whole(path) as partial:
        partial.write_text(str(1 / 0))
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["eval.json"]
    with whole(path) as partial:
        append_jsonl(partial, [{"a": 1}])
    assert path.read_text() == '{"a": 1}\n'
