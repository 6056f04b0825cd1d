import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from tiny import prompt_rows, tiny_causal, tiny_tokenizer
from trainer.helpers import config as settings_of

from bondlm.data.columns import LOGGED_IDS, LOGGED_REWARDS, PROMPT_IDS, PROMPT_ROW
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.prompts import load_prompts, overlap
from bondlm.data.rows import RESERVED
from bondlm.errors import DataError
from bondlm.rewards.extras import NAMES
from bondlm.training.dropped import DropBudget

Write = Callable[..., Path]

# Text that careless readers change: line ends, separators that only `str.splitlines` knows, direction marks, joiners.
ODD_TEXTS = {
    "crlf": "one\r\ntwo\rthree\n",
    "emoji": "a \U0001f469\u200d\U0001f4bb and \U0001f1eb\U0001f1f7",
    "rtl": "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d\u0628\u0627",
    "separators": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
    "zero_width": "a\u200bb\ufeffc\u2060",
    "nul": "a\x00b",
    "combining": "e\u0301 is not \u00e9",
    "megabyte": "long " * 200_000,
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes, name: str = "prompts.jsonl") -> Path:
        path: Path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
def test_odd_text_survives_byte_for_byte(write: Write, text: str, ascii_only: bool) -> None:
    row = {"prompt": text, "source": text}
    messages = {"prompt": chat(("system", text), ("user", text))}
    path = write(json.dumps(row, ensure_ascii=ascii_only) + "\n")
    assert load_prompts(path)[0] == row
    path = write(json.dumps(messages, ensure_ascii=ascii_only))
    assert load_prompts(path)[0] == messages


def test_bom_at_file_start_crlf_and_blank_lines_are_read_through(write: Write) -> None:
    path = write(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n \t\n{"prompt": "b"}\r\n\n{"prompt": "c"}')
    assert load_prompts(path)["prompt"][:] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b'{"prompt": "cut', "Unterminated string", id="cut"),
        pytest.param(b'{"prompt": "a"} x', "Extra data", id="two values"),
        pytest.param(b"{'prompt': 'a'}", "double quotes", id="python quotes"),
        pytest.param(b'{"prompt": "a\x00"}', "Invalid control character", id="raw NUL"),
        pytest.param(b'{"prompt": "a", "score": NaN}', "NaN", id="NaN"),
        pytest.param(b'{"prompt": "a", "score": [-Infinity]}', "-Infinity", id="Infinity"),
        pytest.param(b'{"prompt": "a", "score": 1e999}', "1e999", id="overflow"),
        pytest.param(b'{"prompt": "a", "prompt": "b"}', "'prompt'", id="key twice"),
        pytest.param(b'["a"]', "not a list", id="list"),
        pytest.param(b"null", "not null", id="null"),
        pytest.param(b"3", "not a number", id="number"),
        pytest.param(b"[" * 100_000, "nested", id="deep"),
        pytest.param(b'{"prompt": "\\ud800"}', "surrogate", id="surrogate"),
        pytest.param(b'{"prompt": "a", "more": {"\\udc00": [1]}}', "surrogate", id="surrogate in a key"),
        pytest.param(b'{"prompt": "\xed\xa0\x80"}', "byte 0xed at column 13", id="raw surrogate"),
        pytest.param(b'{"prompt": "caf\xe9"}', "byte 0xe9 at column 16", id="latin-1"),
        pytest.param(b'\xef\xbb\xbf{"prompt": "a"}', "BOM", id="BOM inside"),
    ],
)
def test_lines_that_are_not_strict_json_are_refused_with_their_place(write: Write, line: bytes, reason: str) -> None:
    path = write(b'{"prompt": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)


def test_paired_surrogate_escapes_are_one_character(write: Write) -> None:
    assert load_prompts(write('{"prompt": "\\ud83d\\ude00"}'))[0] == {"prompt": "\U0001f600"}


BAD_ROWS = [
    pytest.param({"text": "a", "id": 1}, "`prompt` (keys: text, id)", id="missing"),
    pytest.param({}, "`prompt` (keys: none)", id="no keys"),
    pytest.param({"prompt": 3}, "not a number", id="number"),
    pytest.param({"prompt": None}, "not null", id="null"),
    pytest.param({"prompt": {"role": "user"}}, "not an object", id="one message"),
    pytest.param({"prompt": ""}, "empty", id="empty"),
    pytest.param({"prompt": " \n\t"}, "empty", id="blank"),
    pytest.param({"prompt": []}, "no messages", id="no messages"),
    pytest.param({"prompt": chat(("user", " "))}, "last message", id="blank message"),
    pytest.param({"prompt": ["a"]}, "message 0: ", id="texts"),
    pytest.param({"prompt": chat(("user", "a"), ("human", "b"))}, "message 1: `role`", id="role"),
    pytest.param({"prompt": [{"content": "a"}]}, "system, developer, user, assistant, tool, not None"),
    pytest.param({"prompt": chat((["user"], "a"))}, "not ['user']", id="role is a list"),
    pytest.param({"prompt": chat(("user", None))}, "message 0: `content`", id="no content"),
    pytest.param({"prompt": chat(("user", [{"type": "image", "image": "x"}]))}, "a part that is 'image'", id="image"),
    pytest.param({"prompt": chat(("user", []))}, "message 0: `content`", id="no parts"),
    pytest.param({"prompt": chat(("user", "a"), ("assistant", None))}, "message 1: `content`", id="null"),
    pytest.param({"prompt": chat(("user", "a"), ("assistant", " "))}, "empty", id="an empty beginning"),
    pytest.param({"prompt": json.dumps(chat(("user", "a")))}, "spells a list of messages", id="JSON of messages"),
    pytest.param({"prompt": str([{"content": "a", "role": "user"}])}, "spells a list of messages", id="their repr"),
    pytest.param({"prompt": [1, 2]}, "prompt_format='rendered'", id="ids"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_prompts_are_refused_with_their_place(write: Write, row: dict[str, Any], reason: str) -> None:
    good = {"prompt": chat(("user", "good")) if isinstance(row.get("prompt"), list) else "good"}
    path = write(lines(good, row, good))
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"^row 1: "):
        load_prompts([good, row, good])


def test_text_that_only_begins_as_messages_do_is_a_prompt() -> None:
    for text in ('[{"content": "milk", "price": 3}]', '[{"role": "admin", "content": "x"}] Who is admin?'):
        assert load_prompts([{"prompt": text}])[0]["prompt"] == text


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_prompt_may_end_with_any_role_but_the_assistant(role: str) -> None:
    rows = [{"prompt": chat(("user", "a"), ("assistant", ""), (role, "b"))}]
    assert load_prompts(rows)[0] == rows[0]


def test_mixed_standard_and_conversational_rows_are_refused(write: Write) -> None:
    path = write(lines({"prompt": "a"}, {"prompt": chat(("user", "b"))}))
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert re.match(rf"{path}:2: .*list.*{path}:1 .*text", str(caught.value))


def test_duplicate_ids_are_refused_and_absent_ones_are_not(write: Write) -> None:
    path = write(
        lines({"id": "x", "prompt": "a"}, {"prompt": "b"}, {"id": None, "prompt": "c"}, {"id": "x", "prompt": "d"})
    )
    with pytest.raises(DataError, match=f"^{path}:4: .*'x'.*{path}:1"):
        load_prompts(path)


def test_all_bad_rows_are_reported_in_order_ten_by_name(write: Write) -> None:
    # Broken lines (even) and bad prompts (odd) are found in two passes, and still come out sorted.
    text = lines({"prompt": "good"}) + "".join('{"cut\n' if n % 2 == 0 else '{"prompt": ""}\n' for n in range(2, 25))
    path = write(text)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    reported = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in reported[:-1]] == [f"{path}:{n}" for n in range(2, 12)]
    assert reported[-1] == "... and 13 more bad rows"


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_files_are_refused(write: Write, content: bytes) -> None:
    path = write(content)
    with pytest.raises(DataError, match=f"{path}: .*no rows"):
        load_prompts(path)


@pytest.mark.parametrize("answer", [{}, {"completion": "x", "reward": 1.0}, {"chosen": "x", "rejected": "y"}])
def test_an_id_may_come_again_where_a_prompt_has_several_rows(write: Write, answer: dict[str, Any]) -> None:
    rows = [{"id": "q1", "prompt": "a"} | answer] * 2
    for source in (write(lines(*rows)), rows, Dataset.from_list(rows)):
        if answer:
            assert len(load_prompts(source)) == 2
        else:
            with pytest.raises(DataError, match="duplicate id 'q1'"):
                load_prompts(source)


def test_names_that_bondlm_gives_to_columns_and_arguments_are_reserved() -> None:
    own = {PROMPT_IDS, PROMPT_ROW, LOGGED_IDS, LOGGED_REWARDS, *NAMES}
    assert own | {"prompts", "completions", "completion_ids", "truncated"} == set(RESERVED)
    messages = [chat(("user", [{"type": "text", "text": "hi"}]))]
    loaded = load_prompts(Dataset.from_dict({"prompt": messages, "other_prompt": ["x"]}))
    assert list(loaded) == [{"prompt": chat(("user", "hi")), "other_prompt": "x"}]


@pytest.mark.parametrize("column", RESERVED)
def test_columns_that_collide_with_reward_arguments_are_refused(write: Write, column: str) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", column: 1}]
    for source in (write(lines(*rows)), rows, Dataset.from_list([rows[1]])):
        with pytest.raises(DataError, match=rf"column.*\b{column}\b"):
            load_prompts(source)


def test_columns_that_differ_between_rows_are_filled_with_none(write: Write) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": 4}, {"prompt": "c", "topic": "x"}]
    expected = [
        {"prompt": "a", "answer": None, "topic": None},
        {"prompt": "b", "answer": 4, "topic": None},
        {"prompt": "c", "answer": None, "topic": "x"},
    ]
    for source in (write(lines(*rows)), rows):
        assert load_prompts(source).to_list() == expected


@pytest.mark.parametrize("values", [(1, "one"), (True, 1), ([1], {"a": 1}), (1, 10**30)])
def test_a_column_of_several_types_is_refused_with_column_and_place(write: Write, values: tuple[Any, Any]) -> None:
    rows = [{"prompt": "a", "answer": values[0]}, {"prompt": "b"}, {"prompt": "c", "answer": values[1]}]
    path = write(lines(*rows))
    for source, place in ((path, rf"{path}:3"), (rows, "row 2")):
        with pytest.raises(DataError, match=rf"^{place}: column 'answer'"):
            load_prompts(source)
        skipped: list[str] = []
        assert load_prompts(source, skipped=skipped)["prompt"][:] == ["a", "b"]
        assert len(skipped) == 1


def test_objects_within_a_column_keep_their_own_keys() -> None:
    """Arrow would give each the keys of all others, with None, and refuse two types."""
    infos = [{"x": 1}, {"y": [1, "a", None]}, None, {"x": "one", "z": {"big": 2**63 - 1, "share": 0.25, "none": None}}]
    tools = [[{"name": "f", "default": 1}], [{"name": "g", "default": "x"}, {}], [], None]
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b", "name": "c"}]
    rows = [
        {"prompt": messages[: 1 + i % 2], "info": info, "tools": tool, "n": i}
        for i, (info, tool) in enumerate(zip(infos, tools, strict=True))
    ]
    loaded = load_prompts(rows)
    assert list(loaded) == rows
    assert list(loaded.select([3, 0]).add_column("more", [1, 2]).remove_columns("more")) == [rows[3], rows[0]]
    with pytest.raises(DataError, match="'info'"):
        load_prompts([{"prompt": "a", "info": {"x": 1}}, {"prompt": "b", "info": {"y": 2**70}}])


def test_a_missing_prompt_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"question": ["a"], "answer": [1]})
    dataset.to_parquet(tmp_path / "p.parquet")
    for source in (dataset, tmp_path / "p.parquet", DatasetDict({"train": dataset})):
        with pytest.raises(DataError, match=r"`prompt`.*question, answer"):
            load_prompts(source)


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_rows_are_plain_whatever_format_the_data_set_has(kind: str) -> None:
    rows = [{"prompt": "a", "label": 1, "weights": [0.5, 1.0]}, {"prompt": "b", "label": 2, "weights": [1.0, 2.0]}]
    assert list(load_prompts(Dataset.from_list(rows).with_format(kind))) == rows
    with pytest.raises(DataError, match="map"):
        load_prompts(Dataset.from_list(rows).with_transform(lambda batch: batch))


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "disk", "disk splits", "dataset", "splits", "list"])
def test_every_source_gives_the_same_rows(write: Write, tmp_path: Path, kind: str, conversational: bool) -> None:
    rows = [row | {"answer": i} for i, row in enumerate(prompt_rows(15, chat=conversational))]
    dataset = Dataset.from_list(rows)
    source: Any
    if kind == "jsonl":
        source = str(write(lines(*rows)))
    elif kind == "parquet":
        source = tmp_path / "prompts.parquet"
        dataset.to_parquet(source)
    elif kind == "disk":
        dataset.save_to_disk(source := tmp_path / "saved")
    elif kind == "disk splits":
        DatasetDict({"test": dataset, "train": dataset}).save_to_disk(source := tmp_path / "saved")
    else:
        source = {"dataset": dataset, "splits": DatasetDict({"train": dataset}), "list": rows}[kind]
    loaded = load_prompts(source)
    assert loaded.to_list() == rows
    assert loaded.column_names == ["prompt", "answer"]


def test_plain_parquet_is_read_afresh_after_a_change(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    for prompts in (["a"], ["b", "c"]):
        pq.write_table(pa.table({"prompt": prompts}), path)
        assert load_prompts(path)["prompt"][:] == prompts


def test_bad_rows_of_other_sources_are_named_by_index(tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"prompt": ["a", "", None], "id": [1, 2, 3]})
    dataset.save_to_disk(tmp_path / "saved")
    pq.write_table(pa.table({"prompt": ["a", "", None]}), tmp_path / "p.parquet")
    for source in (dataset, tmp_path / "saved", tmp_path / "p.parquet", DatasetDict({"train": dataset})):
        with pytest.raises(DataError) as caught:
            load_prompts(source)
        first, second = str(caught.value).split("\n")
        place = f"{source}: " if str(source).endswith(".parquet") else ""
        assert first.startswith(f"{place}row 1: empty")
        assert second.startswith(f"{place}row 2: `prompt`")


def test_rows_that_cannot_be_encoded_are_named_where_they_stand(write: Write, tmp_path: Path) -> None:
    """Also behind bad rows that are left out, in another file, and where several rows are one prompt's samples."""
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder.of_model(tiny_causal(tokenizer), tokenizer, max_completion_length=8)
    first = write("bad\n" * 5 + lines({"prompt": "a"}), "a.jsonl")
    second = write(lines({"prompt": "b"}) + "\n" + lines({"prompt": "word " * 300}), "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl:3: \d+ tokens"):
        encoder.encoded([str(second)])
    budget = DropBudget(0.9, tmp_path, skips_rows=True)
    assert len(budget.encode(budget.load([str(first), str(second)]), encoder)) == 2
    assert budget.skipped_rows[-1].startswith(f"{second}:3: ")
    samples = [{"prompt": p * n, "completion": c, "reward": 1.0} for p, n in (("q ", 1), ("z ", 300)) for c in "abc"]
    samples[1] |= {"reward": None}
    settings = settings_of(tmp_path, objective="listwise", n=2, anchor="fixed")
    budget = DropBudget(0.9, tmp_path, skips_rows=True)
    usable = budget.usable(budget.load(str(write("\n" + lines(*samples), "scored.jsonl"))), settings)
    assert len(budget.encode(budget.group(usable, encoder, settings), encoder)) == 1
    assert [reason.split(": ")[0].rpartition(":")[2] for reason in budget.skipped_rows] == ["3", "5"]


def test_lists_with_surrogates_or_without_rows_are_refused() -> None:
    for row in ({"prompt": "a\udfff"}, {"prompt": "a", "answer": ["\ud800"]}):
        with pytest.raises(DataError, match=r"^row 0: .*surrogate"):
            load_prompts([row])
    sources: list[Any] = [[], Dataset.from_list([])]
    for empty in sources:
        with pytest.raises(DataError, match="no rows"):
            load_prompts(empty)


def test_sources_that_are_not_prompts_are_refused_before_any_network(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "state.json").write_text("{}")
    cases: list[tuple[Any, str]] = [
        (tmp_path / "gone.jsonl", r"gone\.jsonl: .*No such file"),
        (tmp_path / "gone.parquet", r"gone\.parquet: "),
        (tmp_path / "broken.parquet", r"broken\.parquet: .*Parquet magic bytes"),
        (tmp_path / "text", "text: .*`DatasetDict` directory"),
        (write("prompt\na\n", "prompts.txt"), r"prompts\.txt: .*\.jsonl, .*\.parquet"),
        (tmp_path / "*.jsonl", r"\*\.jsonl: no file"),
        (tmp_path / "gone" / "folder", "gone/folder: "),
        ("./gone", r"\./gone: "),
        ({"prompt": ["a"]}, "from a dict"),
        (iter([]), "from a list_iterator"),
        (Dataset.from_list(prompt_rows(2)).to_iterable_dataset(), "streaming.*IterableDataset"),
        (["a", "b"], r"a: no such file.*\{\"prompt\""),
        ([{"prompt": "a"}, "b"], "row 1: .*not text"),
        (DatasetDict({"test": Dataset.from_list(prompt_rows(2))}), "no split train.*test"),
    ]
    for source, reason in cases:
        with pytest.raises(DataError, match=reason):
            load_prompts(source)


def test_hub_names_go_to_load_dataset_with_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Dataset:
        asked.append((name, config, split))
        if name == "org/gone":
            raise ConnectionError("no network")
        return Dataset.from_list(prompt_rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: SPLITS[config])
    assert load_prompts("org/prompts-v1.0:main:test[:3]").to_list() == prompt_rows(3)
    load_prompts("org/prompts")
    load_prompts("org/prompts::test", held_out=True)
    load_prompts("org/prompts", held_out=True)
    assert asked == [
        ("org/prompts-v1.0", "main", "test[:3]"),
        ("org/prompts", None, "train"),
        ("org/prompts", None, "test"),
        ("org/prompts", None, "validation"),
    ]
    for config in ("only", "three"):
        with pytest.raises(DataError, match=r"org/prompts:.*SPLIT"):
            load_prompts(f"org/prompts:{config}", held_out=True)
    with pytest.raises(DataError, match=r"org/gone: .*no network"):
        load_prompts("org/gone")


SPLITS = {None: ["train", "validation"], "only": ["train"], "three": ["train", "validation", "test"]}


def test_held_out_prompts_are_never_the_training_split(tmp_path: Path) -> None:
    train, test = (Dataset.from_list(prompt_rows(n)) for n in (2, 3))
    both = DatasetDict({"train": train, "test": test})
    both.save_to_disk(tmp_path / "saved")
    for source in (both, tmp_path / "saved"):
        assert len(load_prompts(source)) == 2
        assert len(load_prompts(source, held_out=True)) == 3
    assert len(load_prompts(f"{tmp_path}/saved::train", held_out=True)) == 2
    assert len(load_prompts(test, held_out=True)) == 3
    several = DatasetDict({"train": train, "a": test, "b": test})
    for bad in (DatasetDict({"train": train}), several, f"{tmp_path}/saved::x"):
        with pytest.raises(DataError, match="split"):
            load_prompts(bad, held_out=True)


def test_overlap_counts_evaluation_rows_whose_prompt_was_trained_on() -> None:
    rows = prompt_rows(6)
    held_out = [*rows[4:], rows[5], {"prompt": "new"}]
    assert overlap(Dataset.from_list(rows), Dataset.from_list(held_out)) == 3
    assert overlap(held_out, rows) == 2
    assert overlap(rows, [{"prompt": row["prompt"].upper()} for row in rows]) == 0


def test_overlap_of_conversations_looks_at_roles_and_ignores_absent_keys() -> None:
    train = load_prompts([{"prompt": chat(("user", "a"))}, {"prompt": [{"role": "user", "content": "b", "name": "x"}]}])
    assert overlap(train, [{"prompt": chat(("user", "a"))}]) == 1
    assert overlap(train, [{"prompt": [{"name": "x", "content": "b", "role": "user"}]}]) == 1
    assert overlap(train, [{"prompt": chat(("system", "a"))}, {"prompt": chat(("user", "b"))}]) == 0


def test_content_in_parts_is_text_wherever_it_comes_from() -> None:
    rows = [
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": word}, {"type": "text", "text": "!"}]}]}
        for word in ("a", "b")
    ]
    for source in (rows, Dataset.from_list(rows)):
        assert load_prompts(source)["prompt"][:] == [chat(("user", "a!")), chat(("user", "b!"))]


def test_an_assistants_turn_that_calls_a_tool_may_have_no_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "rain"}}]}
    prompt = [*chat(("user", "a")), call, *chat(("tool", "wet"))]
    assert load_prompts([{"prompt": prompt}])["prompt"][0][2]["content"] == "wet"
    with pytest.raises(DataError, match="last message"):
        load_prompts([{"prompt": prompt[:2]}])
