import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bondlm.errors import CheckpointError, ResourceError
from bondlm.models.anchor import Anchor
from bondlm.runs.checkpoint import ANCHOR_FILE, load_tensors, require_space, save_tensors


def anchor(value: float, size: int = 4, name: str = "w", dtype: torch.dtype = torch.float32) -> Anchor:
    weights = nn.Parameter(torch.full((size, 2), value, dtype=dtype))
    return Anchor([(name, weights, nn.Parameter(weights + 1))], schedule="ema", eta=0.1, update_every=1)


def save_anchor(one: Anchor, folder: Path) -> None:
    save_tensors(one.state_dict(), folder / ANCHOR_FILE)


def load_anchor(one: Anchor, folder: Path) -> None:
    load_tensors(folder / ANCHOR_FILE, one.load_state_dict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fp32_master_comes_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    one, other = anchor(0.0, dtype=dtype), anchor(5.0, dtype=dtype)
    for step in range(1, 4):
        one.update(step)
    save_anchor(one, tmp_path)
    load_anchor(other, tmp_path)
    assert torch.equal(one.state_dict()["w"], other.state_dict()["w"])
    assert other.state_dict()["w"].dtype == torch.float32
    assert float(other.state_dict()["w"][0, 0]) == pytest.approx(1 - 0.9**3, rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == [ANCHOR_FILE]  # no half-written file stays behind


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lying_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


@pytest.mark.parametrize("spoil", [Path.unlink, cut, empty, lying_header])
def test_a_missing_or_damaged_anchor_is_refused(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    save_anchor(anchor(0.0), tmp_path)
    spoil(tmp_path / ANCHOR_FILE)
    fresh = anchor(5.0)
    with pytest.raises(CheckpointError, match=ANCHOR_FILE):
        load_anchor(fresh, tmp_path)
    assert float(fresh.state_dict()["w"].mean()) == 5.0


@pytest.mark.parametrize("other", [anchor(5.0, size=3), anchor(5.0, size=1), anchor(5.0, name="v")])
def test_the_anchor_of_another_model_is_refused(tmp_path: Path, other: Anchor) -> None:
    save_anchor(other, tmp_path)
    with pytest.raises(CheckpointError, match=rf"{ANCHOR_FILE}.*(\(4, 2\)|'w')"):
        load_anchor(anchor(0.0), tmp_path)


def test_room_for_the_checkpoints_is_asked_for_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = anchor(0.0, size=1000).num_bytes  # 8,000 bytes in fp32; policy, anchor and two moments make 32,000
    usage = shutil.disk_usage(tmp_path)
    for free, enough in ((96_000, True), (95_999, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if enough:
            require_space(tmp_path / "not" / "yet", one, num_checkpoints=3)
        else:
            with pytest.raises(ResourceError, match=r"3 checkpoints.*save_total_limit") as caught:
                require_space(tmp_path / "not" / "yet", one, num_checkpoints=3)
            assert caught.value.exit_code == 7
