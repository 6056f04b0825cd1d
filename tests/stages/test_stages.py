"""`bondlm sft` and `bondlm reward-model` on tiny models: what they learn, what they save, what they refuse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPTS, prompt_rows, tiny_causal, tiny_t5, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bondlm.cli import main
from bondlm.errors import DataError
from bondlm.rewards import load_rewards, score
from bondlm.stages.rows import hold_out, read_answers, read_preferences
from bondlm.stages.sft import IGNORED, Examples

CHEAP = ["--use_cpu", "true", "--warmup_steps", "0", "--per_device_train_batch_size", "4", "--logging_steps", "5"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save(folder: Path, kind: str) -> str:
    tokenizer = tiny_tokenizer(chat=kind == "causal")
    (tiny_causal(tokenizer) if kind == "causal" else tiny_t5(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# -- sft


@pytest.mark.parametrize(("kind", "extra"), [("causal", []), ("causal", ["--use_peft"]), ("t5", [])])
def test_sft_learns_the_answers_and_saves_what_bondlm_loads(
    tmp_path: Path, kind: str, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"summary": "blue"} for row in prompt_rows(8, chat=kind == "causal")]
    data, model = write(tmp_path / "sft.jsonl", rows), save(tmp_path / "model", kind)
    command = ["sft", "--model", model, "--train_dataset", data, "--eval_dataset", data]
    command += ["--completion_column", "summary", "--max_completion_length", "16"]
    command += ["--output_dir", str(tmp_path / "out"), "--max_steps", "20", "--learning_rate", "2e-2", *CHEAP, *extra]
    assert main(command) == 0
    facts = json.loads((tmp_path / "out" / "sft.json").read_text())
    assert facts["held_out_loss"]["after"] < 0.6 * facts["held_out_loss"]["before"]
    assert facts["steps"] == 20
    assert "held-out loss per token" in capsys.readouterr().out
    assert (
        main(["sample", "--model", str(tmp_path / "out"), "--prompt", PROMPTS[0], "--max_completion_length", "4"]) == 0
    )
    assert main(command) == 6  # the folder holds a model now
    assert "already holds a model" in capsys.readouterr().err


@pytest.mark.parametrize("chat", [True, False])
def test_only_the_answer_and_its_end_are_learned(chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    model = tiny_causal(tokenizer)
    examples = Examples(model, tokenizer, max_prompt_length=None, max_completion_length=16)
    rows = [
        row | {"completion": text} for row, text in zip(prompt_rows(2, chat=chat), ("sky", "cats like it"), strict=True)
    ]
    encoded = examples.encode(rows)
    batch = examples.collate(encoded)
    for ids, labels, row, parts in zip(batch["input_ids"], batch["labels"], rows, encoded, strict=True):
        learned = ids[labels != IGNORED]
        assert learned.tolist() == labels[labels != IGNORED].tolist() == parts["completion_ids"]
        assert tokenizer.decode(learned[:-1]) == row["completion"]
        assert learned[-1] == tokenizer.eos_token_id
    # The loss is the mean of -log p over exactly these tokens.
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].log_softmax(-1)
    target = batch["labels"][:, 1:]
    chosen = logits.gather(2, target.clamp_min(0).unsqueeze(2)).squeeze(2)[target != IGNORED]
    assert model(**batch).loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)


def test_padding_in_a_batch_changes_no_loss() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    model = tiny_t5(tokenizer, dropout=0.0)
    examples = Examples(model, tokenizer, max_prompt_length=None, max_completion_length=32)
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": PROMPTS[1], "completion": PROMPTS[2]}]
    encoded = examples.encode(rows)
    counts = [len(row["completion_ids"]) for row in encoded]
    alone = [model(**examples.collate([row])).loss.item() for row in encoded]
    together = model(**examples.collate(encoded)).loss.item()
    assert together == pytest.approx(sum(a * c for a, c in zip(alone, counts, strict=True)) / sum(counts), rel=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "sft.jsonl:3: no `completion` (keys: prompt)"),
        ({"prompt": "a", "completion": "  "}, "sft.jsonl:3: `completion` is empty"),
        ({"prompt": "a", "completion": 3}, "sft.jsonl:3: `completion` must be text"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "x"}]}, "a list of one assistant message"),
        ({"completion": "x"}, "sft.jsonl:3: no `prompt`"),
    ],
)
def test_bad_answers_are_refused_with_their_line_before_a_model_is_loaded(
    tmp_path: Path, row: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n\n" + json.dumps(row) + "\n")  # a blank line
    assert main(["sft", "--model", "no/such/model", "--train_dataset", str(path)]) == 3
    assert message in capsys.readouterr().err


def test_sft_refuses_long_answers_chats_without_template_and_wrong_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write(tmp_path / "chat.jsonl", [row | {"completion": "yes"} for row in prompt_rows(2, chat=True)])
    texts = write(tmp_path / "text.jsonl", [{"prompt": "a", "completion": "long " * 50}])
    model = save(tmp_path / "model", "t5")
    base = ["sft", "--model", model, "--output_dir", str(tmp_path / "out"), *CHEAP]
    assert main([*base, "--train_dataset", chats]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main([*base, "--train_dataset", texts, "--max_completion_length", "8"]) == 3
    assert "longer than max_completion_length=8" in capsys.readouterr().err
    assert main([*base, "--train_dataset", texts, "--learning_rat", "1"]) == 2
    assert "did you mean 'learning_rate'?" in capsys.readouterr().err
    assert main([*base, "--train_dataset", texts, "--lora_r", "4"]) == 2
    assert "use_peft is not" in capsys.readouterr().err
    assert main(["sft", "--train_dataset", texts]) == 2
    assert main([*base, "--train_dataset", "EdinburghNLP/xsum"]) == 3
    assert "recipes/prepare.py" in capsys.readouterr().err


# -- reward-model


def preferences(n: int, *, chat: bool = False) -> list[dict[str, Any]]:
    """The answer with `blue` is always preferred."""
    return [row | {"chosen": "blue", "rejected": "red"} for row in prompt_rows(n, chat=chat)]


@pytest.mark.parametrize(("chat", "extra"), [(False, []), (True, []), (False, ["--use_peft"])])
def test_a_reward_model_learns_the_preference_and_loads_as_a_reward(
    tmp_path: Path, chat: bool, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = write(tmp_path / "p.jsonl", preferences(40, chat=chat)), save(tmp_path / "model", "causal")
    command = ["reward-model", "--model", model, "--train_dataset", data, "--output_dir", str(tmp_path / "rm")]
    assert main([*command, "--num_train_epochs", "4", "--learning_rate", "5e-3", *CHEAP, *extra]) == 0
    facts = json.loads((tmp_path / "rm" / "reward.json").read_text())
    assert facts["accuracy"]["value"] > 0.9
    assert (facts["held_out_pairs"], facts["train_pairs"]) == (4, 36)
    assert "held-out accuracy" in capsys.readouterr().out
    row = preferences(1, chat=chat)[0]
    answers = [row["chosen"], row["rejected"]]
    completions = [[{"role": "assistant", "content": a}] for a in answers] if chat else answers
    scores = score(load_rewards(str(tmp_path / "rm"), dtype=torch.float32), [row["prompt"]] * 2, completions, {}).total
    assert scores[0] > scores[1]


def test_the_margin_in_training_is_the_difference_of_the_rewards_later(tmp_path: Path) -> None:
    from bondlm.rewards.classifier import SequenceClassifierReward
    from bondlm.stages.reward_model import Pairs, held_out_accuracy, load_base, margins

    model, tokenizer = load_base(save(tmp_path / "model", "causal"))
    rows, pairs = preferences(5), Pairs(model, tokenizer)
    model.eval()
    with torch.no_grad():
        together = margins(model, pairs.collate(pairs.encode(rows)))
    assert any(parameter.requires_grad for parameter in model.parameters())
    reward = SequenceClassifierReward(model, tokenizer)
    prompts = [row["prompt"] for row in rows]
    better, worse = (reward(prompts, [row[name] for row in rows]) for name in ("chosen", "rejected"))
    assert together.tolist() == pytest.approx([a - b for a, b in zip(better, worse, strict=True)], abs=1e-5)
    wins = sum(a > b for a, b in zip(better, worse, strict=True)) / 5
    assert held_out_accuracy(model, pairs, rows, batch_size=2).accuracy.value == pytest.approx(wins)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "blue "}, "p.jsonl:2: `chosen` and `rejected` are equal"),
        ({"chosen": ""}, "p.jsonl:2: `chosen` is empty"),
        ({"rejected": "\n"}, "p.jsonl:2: `rejected` is empty"),
        ({"rejected": None}, "p.jsonl:2: `rejected` must be text"),
    ],
)
def test_bad_pairs_are_refused_with_their_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = preferences(3)
    rows[1] |= change
    with pytest.raises(DataError, match=r"p\.jsonl:2") as caught:
        read_preferences(write(tmp_path / "p.jsonl", rows))
    assert message in str(caught.value)


def test_many_bad_pairs_are_counted(tmp_path: Path) -> None:
    rows = [row | {"rejected": row["chosen"]} for row in preferences(15)]
    with pytest.raises(DataError, match=r"and 5 more bad rows"):
        read_preferences(write(tmp_path / "p.jsonl", rows))


def test_prompts_of_the_accuracy_are_no_training_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "p.jsonl", preferences(4))
    assert main(["reward-model", "--model", "m", "--train_dataset", data, "--eval_dataset", data]) == 3
    assert "4 of 4 rows have a prompt that is also in" in capsys.readouterr().err
    kept, held = hold_out(preferences(20) + preferences(20))
    assert {row["prompt"] for row in kept} & {row["prompt"] for row in held} == set()
    assert (len(kept), len(held)) == (36, 4)
    with pytest.raises(DataError, match="only 4 distinct prompts"):
        hold_out(preferences(4))


def test_an_assistant_message_is_its_text(tmp_path: Path) -> None:
    message = [{"role": "assistant", "content": "yes"}]
    assert read_answers(write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": message}])) == [
        {"prompt": "q", "completion": "yes"}
    ]


@pytest.mark.parametrize("command", ["sft", "reward-model"])
def test_help_is_light(command: str) -> None:
    code = (
        f"import sys; from bondlm.cli import main; main([{command!r}, '--help']); "
        "sys.exit(str({'torch', 'transformers', 'rich'} & set(sys.modules)) if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--train_dataset" in done.stdout


def test_the_saved_adapter_names_its_base(tmp_path: Path) -> None:
    data = write(tmp_path / "sft.jsonl", [row | {"completion": "x"} for row in prompt_rows(4)])
    model = save(tmp_path / "model", "causal")
    command = ["sft", "--model", model, "--train_dataset", data, "--output_dir", str(tmp_path / "out"), "--use_peft"]
    assert main([*command, "--max_steps", "1", "--max_completion_length", "8", *CHEAP]) == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == model
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
