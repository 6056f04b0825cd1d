"""Kinds of files, compressed or not, one or several: the same rows, and each bad one named."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from tiny import tiny_causal, tiny_tokenizer

from bondlm.data.files import files_of, rows_of_files
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.prompts import load_prompts
from bondlm.data.stream import PromptStream
from bondlm.errors import DataError

ROWS = [{"prompt": "12", "answer": 1, "note": "NA"}, {"prompt": "two\nlines", "answer": 2, "note": "2020-01-31"}]
AS_CSV = 'prompt,answer,note\n12,1,NA\n"two\nlines",2,2020-01-31\n'
CONTENTS = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    ".json": json.dumps(ROWS, indent=1),
    "-lines.json": "\ufeff" + "".join(json.dumps(row) + "\n" for row in ROWS),
    ".csv": "\ufeff" + AS_CSV,
    ".tsv": AS_CSV.replace(",", "\t"),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_of_file_gives_the_same_rows(kind: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind}{packed}"
    path.write_bytes(PACKED[packed](CONTENTS[kind].encode()))
    assert list(load_prompts(path)) == ROWS
    if packed:
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(DataError, match=rf"^{path}: cannot be read"):
            load_prompts(path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["007", "10"], ["007", "10"]),
        (["1.5", "-01.5"], ["1.5", "-01.5"]),
        (["0", "-10", ""], [0, -10, None]),
        (["0.50", "1e3", "0"], [0.5, 1000.0, 0.0]),
        (["1", "12345678901234567890"], ["1", "12345678901234567890"]),
        (["2020-01-31", ""], ["2020-01-31", ""]),
        (["True", "false"], [True, False]),
        (["NA", "null"], ["NA", "null"]),
        (["1", "N/A"], ["1", "N/A"]),
        (["true", "None"], ["true", "None"]),
        (["1.5", "nan"], ["1.5", "nan"]),
        (["-inf", "1"], ["-inf", "1"]),
    ],
)
def test_a_column_of_csv_has_another_type_than_text_where_nothing_is_lost(
    values: list[str], expected: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,k,n\n" + "".join(f"a,{value},1\n" for value in values))
    assert load_prompts(path)["k"][:] == expected
    assert load_prompts(path)["n"][:] == [1] * len(values)


def many(folder: Path, kind: str) -> list[str]:
    paths = []
    for i, word in enumerate("ba"):
        rows = [{"prompt": word, "answer": i}, {"prompt": word * 2, "answer": i}]
        paths.append(str(folder / f"{word}{kind}"))
        if kind == ".parquet":
            Dataset.from_list(rows).to_parquet(paths[-1])
        else:
            Path(paths[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_files_of_a_list_come_in_its_order_and_those_of_a_pattern_by_name(kind: str, tmp_path: Path) -> None:
    paths = many(tmp_path, kind)
    assert load_prompts(paths)["prompt"][:] == ["b", "bb", "a", "aa"]
    assert load_prompts(tmp_path / f"*{kind}")["prompt"][:] == ["a", "aa", "b", "bb"]
    assert load_prompts([tmp_path / f"a*{kind}", Path(paths[0])])["answer"][:] == [1, 1, 0, 0]


def test_a_bad_row_of_several_files_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "k": 1}\n')
    (tmp_path / "b.jsonl").write_text('\n{"prompt": "b", "k": "x"}\n')
    with pytest.raises(DataError, match=rf"^{tmp_path}/b\.jsonl:2: column 'k'.*{tmp_path}/a\.jsonl:1"):
        load_prompts(tmp_path / "*.jsonl")
    (tmp_path / "c.csv").write_text("prompt,k\na,1\nb\nc,3,4\n,5\nd,6\n")
    (tmp_path / "d.csv").write_text("prompt,k\ne,7\n")
    skipped: list[str] = []
    files = [tmp_path / "c.csv", tmp_path / "d.csv"]
    assert load_prompts(files, skipped=skipped).to_list() == [
        {"prompt": p, "k": k} for p, k in (("a", 1), ("d", 6), ("e", 7))
    ]
    assert sorted(reason.split(": ")[1] for reason in skipped) == ["row 1", "row 2", "row 3"]
    with pytest.raises(DataError, match=rf"{tmp_path}/c\.csv: row 1: 1 values"):
        load_prompts(files)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"prompt": "a"},\n {"prompt": }]', r"a\.json:2: invalid JSON"),
        ("a.json", b'[{"prompt": "a"}, {"prompt": "a", "prompt": "b"}]', r"a\.json: .*'prompt' appears twice"),
        ("a.json", b'["a"]', r"a\.json: row 0: .*not text"),
        ("a.json", b"[]", r"a\.json: it has no rows"),
        ("a.json", b'{\n "data": [\n  {"prompt": "a"}\n ]\n}', r"^\S*a\.json: holds an object, not rows"),
        ("a.json", b'{"data": [\n  {"prompt": "a"}\n ]}', r"^\S*a\.json: holds an object, not rows"),
        ("a.csv", b"prompt;k\na;1\n", r"a\.csv: no column `prompt`, it has prompt;k\. Separate.*commas"),
        ("a.csv", b"", r"a\.csv: cannot be read: .*[Ee]mpty"),
        ("a.csv", b"prompt\n", r"a\.csv: it has no rows"),
        ("a.csv", b"question\na\n", r"a\.csv: no column `prompt`, it has question"),
        ("a.csv", b"prompt,k,k\na,1,2\n", r"a\.csv: two columns are called 'k'"),
        ("a.csv", b"prompt,k\na,\xff\n", r"a\.csv:2: not UTF-8 \(byte 0xff\): save it as UTF-8"),
        ("a.csv", b"prompt,k\n\xff,a\n", r"a\.csv:2: not UTF-8 \(byte 0xff\): save it as UTF-8"),
        ("a.csv", "prompt\na\n".encode("utf-16"), r"a\.csv:1: not UTF-8 \(byte 0xff\): save it as UTF-8"),
        (
            "a.csv.gz",
            gzip.compress("prompt\nQué\n".encode("latin-1"), mtime=0),
            r"a\.csv\.gz:2: not UTF-8 \(byte 0xe9\)",
        ),
        ("a.parquet.gz", b"", r"a\.parquet\.gz: unknown kind"),
        ("a.jsonl", b'{"prompt": "a"}', "no configs and splits"),
    ],
)
def test_files_that_cannot_be_used_are_refused(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path: Any = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load_prompts(f"{path}::test" if "splits" in reason else path)


def test_lists_of_files_are_of_one_kind_and_fit_together(tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": ["a"], "k": [1]}).to_parquet(tmp_path / "a.parquet")
    Dataset.from_dict({"prompt": ["a"], "k": ["x"]}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "a folder").mkdir()
    for files, reason in (
        (["a.parquet", "a.jsonl"], "one kind"),
        (["a.parquet", "b.parquet"], r"b\.parquet: columns of one name.*\bk\b"),
        (["a.jsonl", "gone.jsonl"], r"gone\.jsonl: .*No such file"),
        (["a.jsonl", "org/name"], "org/name: no such file"),
        (["a.jsonl", "a folder"], r"a folder: a list cannot contain a folder.*a folder/\*\.jsonl"),
    ):
        with pytest.raises(DataError, match=reason):
            load_prompts([tmp_path / name for name in files])


def test_a_folder_of_files_that_differ_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's folder, or a run's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.json").write_text('{"one": 1, "two": "x"}')
    (folder / "b.json").write_text('{"three": [1], "four": {"five": 1}}')
    with pytest.raises(DataError, match=r"^.*model: cannot be read: its files have different columns. Name .*$"):
        load_prompts(folder)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_folder_with_a_line_that_is_no_json_is_refused_in_the_words_of_its_reader(
    tmp_path: Path, held_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / ("test.jsonl" if held_out else "train.jsonl")).write_text('{"prompt": "a"}\n{"prompt": oops}\n')
    with pytest.raises(DataError, match=r"data: cannot be read: .*JSON parse error"):
        load_prompts(folder, held_out=held_out)


def test_a_column_of_images_is_said_once_to_be_no_part_of_the_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "a", "images": ["a.png"]}, {"prompt": "b", "images": []}]
    encoder = PromptEncoder.of_model(tiny_causal(tokenizer := tiny_tokenizer()), tokenizer, max_completion_length=8)
    files = [tmp_path / "rows.jsonl", tmp_path / "rows.parquet"]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(files[1])
    for source in (*files, rows, Dataset.from_list(rows)):
        assert load_prompts(source)["images"][:] == [["a.png"], []]
        assert [record.getMessage().count("column images reaches") for record in caplog.records] == [1]
        caplog.clear()
    for file in files:
        rows_of_files(file)
        assert caplog.text.count("column images reaches") == 1
        caplog.clear()
    PromptStream(files[0], encoder, lambda bad, good: None, skips_rows=False)
    assert caplog.text.count("column images reaches") == 1


def test_a_file_that_is_named_twice_is_refused(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "p"}\n')
    assert len(files_of([str(tmp_path / "a.jsonl"), str(tmp_path / "b.*")])) == 2
    with pytest.raises(DataError, match=r"a\.jsonl is named twice"):
        files_of([str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")])
