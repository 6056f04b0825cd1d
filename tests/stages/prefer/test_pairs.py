"""Which answers meet, and what is no sample."""

from pathlib import Path
from typing import Any

import pytest

from bondlm.errors import ConfigError, DataError
from bondlm.stages.prefer.pairs import Pair, read_pairs, samples_file
from stages.helpers import write

CHAT = [{"role": "user", "content": "Hi?"}]


def rows(prompts: int, answers: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i}", "completion": f"answer {j} to {i}", "reward": 0.5, "token_ids": [1, 2]}
        for i in range(prompts)
        for j in range(answers)
    ]


def as_tuples(pairs: list[Pair]) -> list[tuple[Any, str, str]]:
    return [(pair.row["prompt"], pair.left, pair.right) for pair in pairs]


def test_each_prompt_comes_once_before_one_comes_twice(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "s.jsonl", rows(6, 4)))
    pairs = read_pairs(path, 2, seed=1)
    assert len(pairs) == 12
    assert {pair.row["prompt"] for pair in pairs[:6]} == {f"p{i}" for i in range(6)}
    assert len({pair.key for pair in pairs}) == 12
    assert all(pair.left != pair.right for pair in pairs)
    assert len(read_pairs(path, 100, seed=1)) == 6 * 6  # all there are


def test_the_seed_decides_answers_sides_and_order_and_nothing_else_does(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "s.jsonl", rows(8, 3)))
    more = Path(write(tmp_path / "t.jsonl", rows(12, 3)))
    one, again, other = [as_tuples(read_pairs(path, 1, seed)) for seed in (1, 1, 2)]
    assert one == again
    assert one != other
    assert [pair for pair in as_tuples(read_pairs(more, 1, seed=1)) if pair in one] == one


def test_sides_are_fair(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "s.jsonl", rows(200, 2)))
    first_is_left = [pair.left.startswith("answer 0") for pair in read_pairs(path, 1, seed=0)]
    assert 70 < sum(first_is_left) < 130


def test_equal_and_empty_answers_are_not_compared(tmp_path: Path) -> None:
    texts = ["yes", "yes", " ", "no"]
    path = write(tmp_path / "s.jsonl", [{"prompt": "p", "completion": text} for text in texts])
    (pair,) = read_pairs(Path(path), 9, seed=0)
    assert {pair.left, pair.right} == {"yes", "no"}
    assert pair.key == Pair(pair.row, pair.right, pair.left).key


def test_a_run_shows_what_it_has_logged(tmp_path: Path) -> None:
    texts: dict[str, Any] = {"policy": [{"text": "a", "reward": 1}], "anchor": [{"text": "b", "reward": 2}]}
    write(tmp_path / "samples.jsonl", [{"step": 1, "prompt": CHAT, **texts}])
    (pair,) = read_pairs(samples_file(tmp_path), 1, seed=0)
    assert {pair.left, pair.right} == {"a", "b"}
    assert pair.row["prompt"] == CHAT


def test_what_the_template_looks_at_belongs_to_the_prompt(tmp_path: Path) -> None:
    message = [{"role": "assistant", "content": "b"}]
    samples = [{"prompt": CHAT, "completion": c, "chat_template_kwargs": {"style": s}} for s in "xy" for c in "ab"]
    samples[1]["completion"] = message
    pairs = read_pairs(Path(write(tmp_path / "s.jsonl", samples)), 1, seed=0)
    assert sorted(pair.row["chat_template_kwargs"]["style"] for pair in pairs) == ["x", "y"]
    assert all({pair.left, pair.right} == {"a", "b"} for pair in pairs)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "p"}, r"s\.jsonl:1: no `completion`"),
        ({"prompt": "p", "completion": 3}, r"s\.jsonl:1: `completion`"),
        ({"prompt": "p", "completion": "only one"}, "two different answers"),
        ({"completion": "a"}, "prompt"),
    ],
)
def test_what_is_no_sample_is_refused(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        read_pairs(Path(write(tmp_path / "s.jsonl", [row])), 1, seed=0)


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"samples\.jsonl"):
        samples_file(tmp_path)
    with pytest.raises(ConfigError, match="no file"):
        samples_file(tmp_path / "none.jsonl")
