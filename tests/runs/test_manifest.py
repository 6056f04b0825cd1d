"""A checkpoint is whole or absent: every byte is sealed, and what was not sealed is refused."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bondlm.errors import CheckpointError
from bondlm.runs.manifest import MANIFEST_FILE, fault, newest_checkpoint, seal, seal_changed, verify


def checkpoint(folder: Path, step: int = 4) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "global").mkdir(parents=True)
    (path / "anchor.safetensors").write_bytes(bytes(range(200)))
    (path / "global" / "shard.pt").write_bytes(b"x" * 50)
    (path / "empty.txt").touch()
    seal(path)
    return path


def test_what_was_sealed_verifies(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    assert fault(path) is None
    verify(path)
    assert not list(path.glob("*.tmp"))
    listed = json.loads((path / MANIFEST_FILE).read_text())["files"]
    assert {name: entry["size"] for name, entry in listed.items()} == {
        "anchor.safetensors": 200,
        "empty.txt": 0,
        "global/shard.pt": 50,
    }


@pytest.mark.parametrize("name", ["anchor.safetensors", "global/shard.pt", MANIFEST_FILE])
@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_a_file_cut_anywhere_is_found(tmp_path: Path, name: str, keep: float) -> None:
    path = checkpoint(tmp_path) / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    reason = fault(path.parents[name.count("/")])
    assert reason is not None
    assert name in reason


@pytest.mark.parametrize("name", ["anchor.safetensors", "global/shard.pt"])
@pytest.mark.parametrize("bit", [0, 7, 199, 399])
def test_one_flipped_bit_is_found(tmp_path: Path, name: str, bit: int) -> None:
    path = checkpoint(tmp_path)
    data = bytearray((path / name).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (path / name).write_bytes(bytes(data))
    assert re.match(f"{name} .*hash", str(fault(path)))


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        manifest = json.loads((path / MANIFEST_FILE).read_text())
        change(manifest)
        (path / MANIFEST_FILE).write_text(json.dumps(manifest))

    return apply


def link_out(path: Path) -> None:
    (path.parent / "outside").write_bytes(b"x" * 50)
    (path / "global" / "shard.pt").unlink()
    (path / "global" / "shard.pt").symlink_to(path.parent / "outside")


EMPTY = {"size": 0, "sha256": ""}
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: (p / MANIFEST_FILE).unlink(), MANIFEST_FILE),
    "extra file": (lambda p: (p / "more.pt").touch(), r"more\.pt"),
    "missing file": (lambda p: (p / "empty.txt").unlink(), r"empty\.txt.*missing"),
    "parent": (edit(lambda m: m["files"].update({"../outside": EMPTY})), r"'\.\./outside'.*folder"),
    "absolute": (
        edit(lambda m: m["files"].update({"/etc/passwd": EMPTY})),
        "'/etc/passwd'.*folder",
    ),
    "link": (link_out, r"'global/shard\.pt'.*folder"),
    "newer format": (edit(lambda m: m.update(format=2)), "format 2"),
    "a list": (edit(lambda m: m.update(files=[])), "lists no files"),
    "no hash": (edit(lambda m: m["files"]["empty.txt"].pop("sha256")), r"empty\.txt.*hash"),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_every_fault_is_named(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    path = checkpoint(tmp_path)
    spoil(path)
    assert re.search(message, str(fault(path)))
    with pytest.raises(CheckpointError, match=f"{path} .*{message}"):
        verify(path)


def test_the_newest_good_one_is_taken_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-12.tmp").mkdir()
    (tmp_path / "checkpoint-11" / "anchor.safetensors").unlink()
    path, rejected = newest_checkpoint(tmp_path)
    assert path == tmp_path / "checkpoint-10"
    assert len(rejected) == 1
    assert "checkpoint-11: anchor.safetensors" in rejected[0]


def test_never_afresh_by_accident(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == (None, [])
    for step in (1, 2):
        (checkpoint(tmp_path, step) / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-2.*checkpoint-1"):
        newest_checkpoint(tmp_path)


def test_what_was_added_or_replaced_is_sealed_again(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    for name in ("copied.py", "empty.txt"):  # one new, one in the place of another
        shutil.copy2(__file__, path / name)  # with its old time
        assert name in str(fault(path))
        seal_changed(path)
        assert fault(path) is None
    (path / "global" / "shard.pt").unlink()
    seal_changed(path)
    assert "shard.pt is missing" in str(fault(path))
    shutil.rmtree(path)
    seal_changed(path)


def test_what_is_unchanged_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-4"
    path.mkdir()
    (path / "anchor.safetensors").write_bytes(b"x")
    time.sleep(0.1)  # clocks of file systems are coarse
    seal(path)
    before = (path / MANIFEST_FILE).stat().st_mtime_ns
    seal_changed(path)
    assert (path / MANIFEST_FILE).stat().st_mtime_ns == before
