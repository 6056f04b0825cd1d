"""`~` is the home folder wherever a path is given, and a folder that is missing is said to be."""

import os
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_causal, tiny_tokenizer
from trainer.helpers import trainer

from bondlm.cli.options import parse
from bondlm.data.paths import as_seen_from, located, refuse_absent_folder
from bondlm.data.prompts import load_prompts
from bondlm.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_command_line_and_its_file_know_the_home_folder(home: Path) -> None:
    (home / "run.yaml").write_text("train_dataset: ~/train.jsonl\noutput_dir: ~/run\nreward_funcs: [~/r.py:f]\n")
    options = parse("train", ["--config", "~/run.yaml", "--model", "~/model"])
    assert options["model"] == str(home / "model")
    assert options["train_dataset"] == str(home / "train.jsonl")
    assert options["output_dir"] == str(home / "run")
    assert options["reward_funcs"] == [str(home / "r.py:f")]
    assert parse("sample", ["--prompt", "~/ is home", "--model", "m"])["prompt"] == "~/ is home"


def test_python_knows_it_too(home: Path) -> None:
    (home / "train.jsonl").write_text('{"prompt": "a"}\n')
    (home / "reward.py").write_text("def length(completions):\n    return [float(len(c)) for c in completions]\n")
    tokenizer = tiny_tokenizer()
    tiny_causal(tokenizer).save_pretrained(home / "model")
    assert len(load_prompts("~/train.jsonl")) == 1
    made = trainer(
        home / "out", "~/model", reward="~/reward.py:length", train_dataset="~/train.jsonl", prompt_format="auto"
    )
    assert len(made.train_dataset) == 1
    assert not Path("~").exists()


@pytest.mark.parametrize("name", ["./nope", "/nowhere/at/all", "a/b/c", "runs/nope"])
def test_what_can_only_be_a_folder_is_not_looked_for_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        refuse_absent_folder(name, "model")
    arguments: dict[str, Any] = {"reward": lambda completions: [0.0] * len(completions)}
    with pytest.raises(ConfigError, match=os.path.basename(name)) as caught:
        trainer(tmp_path / "out", name, **arguments)
    assert "internet" not in str(caught.value) + str(caught.value.__cause__)


@pytest.mark.parametrize("name", ["gpt2", "org/model", "nopath/model"])
def test_a_name_of_the_hub_passes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_absent_folder(name, "model")


def test_what_a_run_named_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "reward.py").write_text("")
    monkeypatch.chdir("/")
    assert as_seen_from(tmp_path, ["base", "reward.py:f", "nli:base?template=true", "org/name", "a.b:f", 3]) == [
        *(f"{tmp_path}/base", f"{tmp_path}/reward.py:f", f"nli:{tmp_path}/base?template=true"),
        *("org/name", "a.b:f", 3),
    ]
    for spec in ("base?truncate=left", "base::test", "base:english:test"):
        assert as_seen_from(tmp_path, spec) == f"{tmp_path}/{spec}"
    judge = "judge:https://host/v1?model=m&prompt={}&rounds=2"
    assert as_seen_from(tmp_path, ["rank:reward.py:f", "rew*.py", judge.format("reward.py"), "none*.jsonl"]) == [
        *(f"rank:{tmp_path}/reward.py:f", f"{tmp_path}/rew*.py", judge.format(f"{tmp_path}/reward.py"), "none*.jsonl")
    ]
    assert as_seen_from(tmp_path, str(tmp_path / "base")) == str(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert as_seen_from(tmp_path, ["base", "reward.py:f"]) == ["base", "reward.py:f"]
    assert (located("base"), located("org/name"), located("")) == (f"{tmp_path}/base", "org/name", "")
