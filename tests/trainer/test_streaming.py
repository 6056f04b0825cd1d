"""Prompts that are read as the run goes: the order, the place that a resume goes on from, and what is refused."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from tiny import prompt_rows, tiny_causal

from bondlm import BONDTrainer
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.stream import PromptStream
from bondlm.errors import ConfigError, DataError
from trainer.helpers import TOKENIZER, same, trainer, weights


def write(folder: Path, rows: list[Any], name: str = "prompts.jsonl") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def streamed(folder: Path, source: Any, **settings: Any) -> BONDTrainer:
    wanted = {"streaming": not isinstance(source, IterableDataset), "prompt_format": "plain", "max_steps": 4}
    return trainer(folder, train_dataset=source, **(wanted | settings))


def test_a_stream_trains_as_the_same_rows_in_their_order(tmp_path: Path) -> None:
    rows = [row | {"label": i} for i, row in enumerate(prompt_rows(8))]
    whole = trainer(tmp_path / "whole", train_dataset=rows, train_sampling_strategy="sequential")
    stream = Dataset.from_list(rows).to_iterable_dataset()
    whole.train()
    for i, source in enumerate([write(tmp_path, rows), stream.with_format("torch")]):
        made = streamed(tmp_path / str(i), source, max_steps=2)
        made.train()
        assert same(weights(made.roles.model), weights(whole.roles.model))


def test_workers_are_not_used_for_a_stream_and_it_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_workers = {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    sources = [write(tmp_path, prompt_rows(8)), Dataset.from_list(prompt_rows(8)).to_iterable_dataset()]
    made = [
        streamed(tmp_path / "given", sources[1], max_steps=1, dataloader_num_workers=2, **of_workers),
        streamed(tmp_path / "none", sources[0], max_steps=1),
    ]
    assert [record.args for record in caplog.records if "dataloader_num_workers" in record.msg] == [(2,)]
    for each in made:
        each.train()
    assert made[0].get_train_dataloader().num_workers == 0
    assert same(*(weights(each.roles.model) for each in made))


def test_a_resumed_run_goes_on_where_the_stream_was(tmp_path: Path) -> None:
    """Over more than one pass: 4 steps of 4 prompts take 6 rows nearly three times, shuffled anew each time."""

    def run(folder: str, **changes: Any) -> BONDTrainer:
        stream = Dataset.from_list(prompt_rows(6)).to_iterable_dataset().shuffle(seed=1, buffer_size=3)
        return streamed(tmp_path / folder, stream, save_strategy="steps", save_steps=2, **changes)

    once = run("once")
    once.train()
    run("parts", max_steps=2).train()
    going_on = run("parts")
    going_on.train(resume_from_checkpoint=True)
    assert going_on.state.global_step == 4
    assert same(weights(going_on.roles.model), weights(once.roles.model))
    rows = [json.loads(line) for line in (tmp_path / "parts" / "samples.jsonl").read_bytes().splitlines()]
    passes = [[row["prompt"] for row in rows[i : i + 6]] for i in (0, 6)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(row["prompt"] for row in prompt_rows(6))
    assert passes[0] != passes[1]


def test_another_stream_is_not_gone_on_with(tmp_path: Path) -> None:
    rows, settings = prompt_rows(6), {"save_strategy": "steps", "save_steps": 1}
    streamed(tmp_path / "run", write(tmp_path, rows), max_steps=1, **settings).train()

    def resume(source: Any, **changes: Any) -> None:
        streamed(tmp_path / "run", source, **(settings | changes)).train(resume_from_checkpoint=True)

    before = (tmp_path / "run" / "checkpoint-1" / "data.json").read_bytes()
    with pytest.raises(DataError, match="train_dataset has changed"):
        resume(write(tmp_path, [*rows[:2], {"prompt": "another"}, *rows[3:]]))
    with pytest.raises(ConfigError, match="per_device_train_batch_size"):
        resume(write(tmp_path, rows), per_device_train_batch_size=2)
    with pytest.raises(ConfigError, match="streaming"):
        resume(rows, streaming=False)
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    assert (tmp_path / "run" / "checkpoint-1" / "data.json").read_bytes() == before


def test_bad_rows_are_met_in_their_turn(tmp_path: Path) -> None:
    rows: list[Any] = [*prompt_rows(40), {"prompt": ""}, {"prompt": "x" * 300}, *prompt_rows(4)]
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: .*`prompt`"):
        streamed(tmp_path / "none", write(tmp_path, [{"text": "a"}]))
    settings = {"max_steps": 5, "per_device_train_batch_size": 10, "max_completion_length": 1}
    failing = streamed(tmp_path / "fail", write(tmp_path, rows), **settings)
    with pytest.raises(DataError, match=r"prompts\.jsonl:41: empty"):
        failing.train()
    assert failing.state.global_step == 2  # of the 32 rows of the first chunk; the loader looks one batch ahead
    assert (tmp_path / "fail" / "checkpoint-2" / "manifest.json").is_file()  # what was learned is saved
    skipping = streamed(tmp_path / "skip", write(tmp_path, rows), on_bad_row="skip", max_skipped_frac=0.1, **settings)
    skipping.train()
    assert skipping.state.global_step == 5
    assert [reason.split(": ")[0].split(":")[-1] for reason in skipping.drops.skipped_rows] == ["41", "42"]


@pytest.mark.parametrize("error", [OSError("connection reset"), DatasetGenerationError("failed"), KeyError("page")])
def test_a_stream_that_cannot_be_read_on_costs_nothing_that_was_learned(error: Exception, tmp_path: Path) -> None:
    def rows() -> Iterator[Any]:
        yield from prompt_rows(40)
        raise error

    made = streamed(tmp_path, IterableDataset.from_generator(rows), max_steps=20)
    with pytest.raises(DataError, match=rf"behind row 39 \({type(error).__name__}: .*a run has saved what it learned"):
        made.train()
    assert made.state.global_step > 0
    assert (tmp_path / f"checkpoint-{made.state.global_step}" / "manifest.json").is_file()


def test_a_damaged_page_of_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    rows = [f"question {i} " + "x" * 50 for i in range(6000)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": rows}), path, row_group_size=2000, compression="none")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = b"\xff" * 3000
    path.write_bytes(data)
    encoder = PromptEncoder.of_model(tiny_causal(TOKENIZER), TOKENIZER, max_completion_length=1)
    with pytest.raises(DataError, match=r"behind .*prompts\.parquet: row \d+ \("):
        list(islice(PromptStream(str(path), encoder, lambda skipped, good: None, skips_rows=False), 6000))


def test_a_row_of_a_stream_that_cannot_be_encoded_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "word " * 300} if i == 70 else {"prompt": f"question {i}"} for i in range(80)])
    encoder = PromptEncoder.of_model(tiny_causal(TOKENIZER), TOKENIZER, max_completion_length=1)
    with pytest.raises(DataError, match=r"prompts\.jsonl:71: \d+ tokens"):
        list(islice(PromptStream(path, encoder, lambda skipped, good: None, skips_rows=False), 80))


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("prompts.jsonl", {"max_steps": -1}, "max_steps"),
        (prompt_rows(4), {}, "streaming=True.*list"),
        (Dataset.from_list(prompt_rows(4)), {}, "streaming=True.*Dataset"),
        ("prompts.csv", {}, r"prompts\.csv"),
        ("scored.jsonl", {"objective": "best_of_n_sft", "anchor": "fixed"}, "streaming: scored"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    source: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, prompt_rows(4))
    (tmp_path / "prompts.csv").write_text("prompt\na\n")
    write(tmp_path, [{"prompt": "a", "completion": "b", "reward": 1.0}] * 4, "scored.jsonl")
    source = str(tmp_path / source) if isinstance(source, str) else source
    with pytest.raises(ConfigError, match=message):
        streamed(tmp_path / "run", source, model=tiny_causal(TOKENIZER), **settings)
