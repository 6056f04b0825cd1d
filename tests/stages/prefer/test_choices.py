"""The file of choices: what a row says, what survives, and that nothing is asked twice."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bondlm.errors import CheckpointError, ConfigError, DataError
from bondlm.stages.prefer import choices as module
from bondlm.stages.prefer.choices import Choices, held
from bondlm.stages.prefer.pairs import Pair
from bondlm.stages.rows import read_preferences

PAIRS = [Pair({"prompt": f"p{i}"}, f"left {i}", f"right {i}") for i in range(4)]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_says_what_was_chosen_and_where_it_stood_and_reward_model_reads_it(tmp_path: Path) -> None:
    kept = Choices(tmp_path / "p.jsonl")
    for pair, verdict in zip(PAIRS, ("left", "right", "tie", "skip"), strict=True):
        kept.add(pair, verdict)  # type: ignore[arg-type]
    assert rows(kept.path) == [
        {"prompt": "p0", "chosen": "left 0", "rejected": "right 0", "verdict": "left"},
        {"prompt": "p1", "chosen": "right 1", "rejected": "left 1", "verdict": "right"},
        {"prompt": "p2", "left": "left 2", "right": "right 2", "verdict": "tie"},
        {"prompt": "p3", "left": "left 3", "right": "right 3", "verdict": "skip"},
    ]
    assert [(row["chosen"], row["rejected"]) for row in read_preferences(str(kept.path))] == [
        ("left 0", "right 0"),
        ("right 1", "left 1"),
    ]
    assert Choices(kept.path).left_of(PAIRS) == []


def test_a_choice_is_on_the_disk_when_the_next_pair_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, synced = Choices(tmp_path / "p.jsonl"), []

    def note(number: int) -> None:
        synced.append(os.fstat(number).st_size)

    monkeypatch.setattr(module.os, "fsync", note)
    kept.add(PAIRS[0], "left")
    assert synced == [kept.path.stat().st_size]


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Choices(tmp_path / "p.jsonl")
    kept.add(PAIRS[0], "left")
    before = kept.path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        kept.add(PAIRS[1], "tie")
    assert kept.path.read_bytes() == before
    assert kept.left_of(PAIRS) == PAIRS[1:]


def test_pairs_are_decided_whichever_side_they_stand_on(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    Choices(path).add(PAIRS[0], "right")
    turned = Pair(PAIRS[0].row, PAIRS[0].right, PAIRS[0].left)
    assert Choices(path).left_of([turned, *PAIRS]) == PAIRS[1:]


@pytest.mark.parametrize("torn", [b'{"prompt": "p1", "chos', b'{"prompt": "p\xc3', b"{", b"\0\0\0"])
def test_half_a_row_is_removed_and_its_pair_asked_again(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "p.jsonl"
    Choices(path).add(PAIRS[0], "left")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert Choices(path).left_of(PAIRS) == PAIRS[1:]
    assert path.read_bytes() == whole


def test_a_file_that_an_editor_has_left_without_its_last_end_of_line_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    Choices(path).add(PAIRS[0], "left")
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    again = Choices(path)
    again.add(PAIRS[1], "skip")
    assert len(rows(path)) == 2
    assert Choices(path).left_of(PAIRS) == PAIRS[2:]


@pytest.mark.parametrize("row", ["[1]", '{"prompt": "p"}', '{"prompt": "p", "chosen": "a"}', "no JSON"])
def test_what_is_no_choice_is_named_and_not_overwritten(tmp_path: Path, row: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{row}\n")
    with pytest.raises(DataError, match=r"p\.jsonl:1"):
        Choices(path)
    assert path.read_text() == f"{row}\n"


def test_one_page_at_a_time_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with held(path):
        with pytest.raises(CheckpointError, match="in use"), held(path):
            pass
        with held(tmp_path / "other.jsonl"):
            pass
    with held(path):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="output"), held(tmp_path / "no" / "p.jsonl"):
        pass
    with pytest.raises(ConfigError, match="output"), held(tmp_path):
        pass


@pytest.mark.parametrize("content", ["prompt,chosen\na,b\nlast line", "one line", '{"prompt": "p"}\nnotes', '{"a": 1'])
def test_nothing_is_cut_off_a_file_that_is_not_of_choices(content: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text(content)
    with pytest.raises(DataError, match="not a choice"):
        Choices(path)
    assert path.read_text() == content
