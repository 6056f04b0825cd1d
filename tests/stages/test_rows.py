"""Answers and preferences in files: what is read, and what is refused with its line."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bondlm.cli import main
from bondlm.errors import DataError
from bondlm.stages.rows import hold_out, read_answers, read_preferences
from stages.helpers import CHEAP, preferences, save, write


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"sft\.jsonl:3: .*`completion`.*keys: prompt"),
        ({"prompt": "a", "completion": "  "}, r"sft\.jsonl:3: `completion`.*empty"),
        ({"prompt": "a", "completion": 3}, r"sft\.jsonl:3: `completion`.*text.*int"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "x"}]}, r"sft\.jsonl:3: `completion`.*assistant"),
        ({"completion": "x"}, r"sft\.jsonl:3: .*`prompt`"),
    ],
)
def test_bad_answers_are_refused_with_their_line_before_a_model_is_loaded(
    tmp_path: Path, row: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n\n" + json.dumps(row) + "\n")  # a blank line
    assert main(["sft", "--model", "no/such/model", "--train_dataset", str(path)]) == 3
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "blue "}, r"p\.jsonl:2: `chosen`.*`rejected`"),
        ({"chosen": ""}, r"p\.jsonl:2: `chosen`.*empty"),
        ({"rejected": "\n"}, r"p\.jsonl:2: `rejected`.*empty"),
        ({"rejected": None}, r"p\.jsonl:2: `rejected`.*text.*NoneType"),
        ({"margin": "3.0"}, r"p\.jsonl:2: `margin`.*number.*text"),
        ({"margin": True}, r"p\.jsonl:2: `margin`.*number.*boolean"),
        ({"margin": 1e300}, r"p\.jsonl:2: `margin`.*finite.*1e\+300"),
    ],
)
def test_bad_pairs_are_refused_with_their_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = preferences(3)
    rows[1] |= change
    with pytest.raises(DataError, match=message):
        read_preferences(write(tmp_path / "p.jsonl", rows))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_trls_other_forms_of_rows_are_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    """Once, not in each of the lines."""
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for read, rows, message in (
        (read_answers, [{"messages": talk}] * 3, "Split `messages`: the last one is the answer, `completion`"),
        (read_preferences, [{"chosen": talk, "rejected": talk}] * 3, "Split `chosen` and `rejected`: what both begin"),
    ):
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            write(path, rows)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        with pytest.raises(DataError, match=r"no.* `prompt`") as caught:
            read(str(path))
        assert str(caught.value).count(message) == 1


def test_a_margin_is_read_with_its_pair(tmp_path: Path) -> None:
    rows = [row | margin for row, margin in zip(preferences(3), ({"margin": 2}, {"margin": None}, {}), strict=True)]
    read = read_preferences(write(tmp_path / "p.jsonl", rows))
    assert [row.get("margin") for row in read] == [2.0, None, None]


@pytest.mark.parametrize(("number", "stage"), [(13, "reward-model"), (9, "reward-model"), (13, "sft")])
def test_a_row_that_is_too_long_is_named_by_its_line(
    tmp_path: Path, number: int, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind held-out rows, and where it is one of these, before any training."""
    rows = [row | {"completion": "blue"} for row in preferences(20)]
    rows[number] |= {"chosen": "blue " * 300, "completion": "blue " * 300}
    given = [stage, "--model", save(tmp_path / "m", "causal"), "--train_dataset", write(tmp_path / "p.jsonl", rows)]
    given += ["--max_completion_length", "16"] if stage == "sft" else []
    assert main([*given, "--output_dir", str(tmp_path / "out"), *CHEAP]) == 3
    told = capsys.readouterr()
    assert re.search(rf"p\.jsonl:{number + 1}\b", told.err)
    assert "step " not in told.out


@pytest.mark.parametrize("answers", [["12", "2.50"], ["True", "false"], ["2020-01-31", "NA"]])
def test_answers_in_a_csv_are_text_whatever_their_column_is_called(tmp_path: Path, answers: list[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,answer\n" + "".join(f"p,{answer}\n" for answer in answers))
    assert [row["completion"] for row in read_answers(str(path), "answer")] == answers


def test_many_bad_pairs_are_counted(tmp_path: Path) -> None:
    rows = [row | {"rejected": row["chosen"]} for row in preferences(15)]
    with pytest.raises(DataError, match="5 more bad rows"):
        read_preferences(write(tmp_path / "p.jsonl", rows))


def test_prompts_of_the_accuracy_are_no_training_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "p.jsonl", preferences(4))
    assert main(["reward-model", "--model", "m", "--train_dataset", data, "--eval_dataset", data]) == 3
    assert "4 of 4 rows" in capsys.readouterr().err
    kept, held = hold_out(preferences(20) + preferences(20))
    assert {row["prompt"] for row in kept} & {row["prompt"] for row in held} == set()
    assert (len(kept), len(held)) == (36, 4)
    with pytest.raises(DataError, match=r"\b4 distinct prompts.*eval_dataset"):
        hold_out(preferences(4))


def test_an_assistant_message_is_its_text(tmp_path: Path) -> None:
    message = [{"role": "assistant", "content": "yes"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": message}])
    assert read_answers(path) == [{"prompt": "q", "completion": "yes", "place": f"{path}:1"}]


def test_pairs_of_which_none_was_preferred_are_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write(tmp_path / "p.jsonl", preferences(12))
    ties = write(tmp_path / "ties.jsonl", [row | {"verdict": "tie"} for row in preferences(12)])
    for data in (["--train_dataset", ties], ["--train_dataset", ties, "--eval_dataset", pairs]):
        assert main(["reward-model", "--model", "no/such/model", *data]) == 3
        assert "ties.jsonl: 12 rows, all ties" in capsys.readouterr().err
    assert main(["reward-model", "--model", "no/such/model", "--train_dataset", pairs, "--eval_dataset", ties]) == 3
    assert "ties.jsonl: 12 rows, all ties" in capsys.readouterr().err
