"""Rows T8 to T12 of the fault matrix: files and rows; more of each is in tests/data."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from cli.helpers import write_job
from data.helpers import encode, user
from tiny import prompt_rows
from trainer.helpers import TOKENIZER, same, trainer, weights

from bondlm.cli import main
from bondlm.data.files import rows_of_files
from bondlm.data.prompts import load_prompts
from bondlm.errors import DataError


def write(path: Path, *lines: Any) -> Path:
    """JSON for objects, bytes as they are."""
    parts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(part + b"\n" for part in parts))
    return path


ODD = [
    "a\x00b",
    "e\u0301\u200d\u200f",
    "\u202eabc\u202c",
    "\U0001f469\u200d\U0001f4bb",
    "word " * 200_000,
    "end\r",
    "a\u2028b",
]


def test_t8_odd_text_survives_and_half_a_character_does_not(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in ODD]
    path = write(tmp_path / "odd.jsonl", *rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [line.row for line in rows_of_files(path)] == rows
    short = [text[:10_000] for text in ODD]
    for text, ids in zip(short, encode(short, TOKENIZER), strict=True):
        assert TOKENIZER.decode(ids) == text
    bad = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, b'{"prompt": "\\ud800"}', b'\xef\xbb\xbf{"prompt": "late"}')
    with pytest.raises(DataError) as caught:
        rows_of_files(bad)
    first, second = str(caught.value).splitlines()
    assert re.match(rf"{bad}:2: .*surrogate", first)
    assert second.startswith(f"{bad}:3: ")


BAD_LINES = {
    "cut": b'{"prompt": "ab',
    "not an object": b'["prompt"]',
    "no prompt": b'{"text": "a"}',
    "a number": b'{"prompt": 3}',
    "empty": b'{"prompt": " "}',
    "twice": b'{"prompt": "x", "id": 1}',
    "NaN": b'{"prompt": "x", "score": NaN}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_t9_a_bad_row_is_refused_with_its_place_or_skipped(line: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "one", "id": 1}, line, {"prompt": "three", "id": 3})
    with pytest.raises(DataError, match=r"data\.jsonl:2: ") as caught:
        load_prompts(path)
    assert caught.value.exit_code == 3
    skipped: list[str] = []
    assert load_prompts(path, skipped=skipped)["prompt"][:] == ["one", "three"]
    assert skipped == [str(caught.value)]


def test_t9_skipped_rows_are_counted_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_job(tmp_path, max_steps=1, save_steps=1, eval_dataset=None, max_completion_length=4)
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text() + '{"prompt": 5}\n{"prompt": ""}\n')
    assert main(["train", "--config", str(config)]) == 3
    assert main(["train", "--config", str(config), "--on_bad_row", "skip"]) == 3
    said = capsys.readouterr().err
    assert re.search(r"2 of 18 rows.*max_skipped_frac=0\.01", said)
    assert re.search(r"train\.jsonl:18: empty", said)
    assert main(["train", "--config", str(config), "--on_bad_row", "skip", "--max_skipped_frac", "0.2"]) == 0
    assert "left out: 2 bad rows of train_dataset, first " in " ".join(capsys.readouterr().out.split())


def test_t9_bad_rows_of_a_list_are_skipped_too(tmp_path: Path) -> None:
    rows = [*prompt_rows(4), {"prompt": user("a chat among texts")}]
    with pytest.raises(DataError, match="row 4"):
        trainer(tmp_path, train_dataset=rows)
    made = trainer(tmp_path, train_dataset=rows, on_bad_row="skip")
    assert len(made.train_dataset) == 4  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"1 of 5 rows.*max_skipped_frac"):
        trainer(tmp_path, train_dataset=rows, on_bad_row="skip", max_skipped_frac=0.0)
    with pytest.raises(DataError, match="none of its 1 rows"):
        load_prompts([{"prompt": ""}], skipped=[])


def test_t10_an_empty_file_fewer_prompts_than_a_batch_and_no_steps(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl: .*no rows") as caught:
        trainer(tmp_path, train_dataset=str(write(tmp_path / "empty.jsonl")))
    assert caught.value.exit_code == 3
    made = trainer(tmp_path / "few", rows=3, per_device_train_batch_size=8, max_steps=2)
    made.train()  # an epoch is one step of 3 prompts
    assert made.state.global_step == 2
    none = trainer(tmp_path / "none", max_steps=-1, num_train_epochs=0)
    before = weights(none.roles.model)
    none.train()
    assert none.state.global_step == 0
    assert same(weights(none.roles.model), before)


def test_t11_data_that_changed_are_refused_on_resume(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    for rows in (prompt_rows(9), [*prompt_rows(7), {"prompt": "another"}]):
        again = trainer(tmp_path, train_dataset=rows, max_steps=2)
        with pytest.raises(DataError, match=r"train_dataset .*checkpoint-1") as caught:
            again.train(resume_from_checkpoint=True)
        assert caught.value.exit_code == 3
    trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_t12_held_out_prompts_that_are_trained_on_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="bondlm.data.prompts"):
        trainer(tmp_path, eval_dataset=prompt_rows(12)[8:])
        assert caplog.text == ""
        trainer(tmp_path, eval_dataset=prompt_rows(12)[6:])
    assert "2 of 6 evaluation prompts" in caplog.text


@pytest.mark.parametrize("command", ["train", "check"])
def test_t12_strict_makes_them_an_error(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_job(tmp_path, max_steps=1, save_steps=1, max_completion_length=4)  # its held-out prompts are trained
    assert main([command, "--config", str(config), "--strict", "true"]) == 3
    first, *rows = capsys.readouterr().err.rsplit("bondlm: error:", 1)[1].splitlines()
    assert re.search("6 of 6 evaluation prompts.*strict=True", first)
    assert rows[1].startswith("row 1 of eval_dataset: ")
    assert prompt_rows(2)[1]["prompt"] in rows[1]
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(20, chat=True)[16:]))
    assert main(["check", "--config", str(config), "--strict", "true"]) == 0
