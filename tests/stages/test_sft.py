"""`bondlm sft` on tiny models: what it learns, what it saves, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import CHATS, PROMPTS, prompt_rows, tiny_causal, tiny_t5, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from bondlm.cli import main
from bondlm.data.rendering import Rendering
from bondlm.stages.sft import IGNORED, Examples, sft_trainer
from stages.helpers import CHEAP, save, write


@pytest.mark.parametrize(("kind", "extra"), [("causal", []), ("causal", ["--use_peft"]), ("t5", [])])
def test_sft_learns_the_answers_and_saves_what_bondlm_loads(
    tmp_path: Path, kind: str, extra: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row | {"summary": "blue"} for row in prompt_rows(8, chat=kind == "causal")]
    data = write(tmp_path / "sft.jsonl", rows)
    save(tmp_path / "model", kind)
    monkeypatch.chdir(tmp_path)
    command = ["sft", "--model", "model", "--train_dataset", data, "--eval_dataset", data]
    command += ["--completion_column", "summary", "--max_completion_length", "16"]
    command += ["--output_dir", str(tmp_path / "out"), "--max_steps", "20", "--learning_rate", "2e-2", *CHEAP, *extra]
    assert main(command) == 0
    facts = json.loads((tmp_path / "out" / "sft.json").read_text())
    assert facts["held_out_loss"]["after"] < 0.6 * facts["held_out_loss"]["before"]
    assert facts["steps"] == 20
    said = capsys.readouterr().out
    assert "held-out loss per token" in said
    assert "8 of 8 rows of eval_dataset" in said
    monkeypatch.chdir(tmp_path / "out")  # an adapter's base is found from everywhere
    assert (
        main(["sample", "--model", str(tmp_path / "out"), "--prompt", PROMPTS[0], "--max_completion_length", "4"]) == 0
    )
    assert main(command) == 6  # the folder holds a model now
    assert f"{tmp_path / 'out'}" in capsys.readouterr().err


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
        assert learned.tolist() == labels[labels != IGNORED].tolist() == [i for i in parts["labels"] if i != IGNORED]
        assert tokenizer.decode(learned[:-1]) == row["completion"]
        assert learned[-1] == tokenizer.eos_token_id
    # The loss is the mean of -log p over exactly these tokens.
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].log_softmax(-1)
    target = batch["labels"][:, 1:]
    chosen = logits.gather(2, target.clamp_min(0).unsqueeze(2)).squeeze(2)[target != IGNORED]
    assert model(**batch).loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)


def test_plain_rows_of_a_chat_model_are_learned_as_it_is_asked_later() -> None:
    """Rendered as messages, and ended as the template ends a turn, not by the first of two end tokens."""
    tokenizer = tiny_tokenizer()
    model = tiny_causal(tokenizer)
    model.generation_config.eos_token_id = [5, 2]
    rows = [{"prompt": PROMPTS[0], "completion": "sky"}]
    limits: dict[str, Any] = {"max_prompt_length": None, "max_completion_length": 16}
    (auto,) = Examples(model, tokenizer, **limits).encode(rows)
    (messages,) = Examples(model, tokenizer, **limits).encode([rows[0] | {"prompt": CHATS[0]}])
    assert auto == messages
    assert auto["input_ids"][-1] == 2
    (plain,) = Examples(model, tokenizer, rendering=Rendering(prompt_format="plain"), **limits).encode(rows)
    assert plain["input_ids"][-1] == 5
    assert tokenizer.decode(plain["input_ids"][:-1]) == PROMPTS[0] + "sky"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("has_pad", [True, False])
def test_padding_is_on_the_right_and_the_tokenizer_stays_as_it_is(side: str, has_pad: bool) -> None:
    """GPT-2 counts its positions from the first column: padding on the left would move them."""
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.padding_side = side
    if not has_pad:
        tokenizer.pad_token = None
    examples = Examples(tiny_causal(tokenizer), tokenizer, max_prompt_length=None, max_completion_length=32)
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": PROMPTS[1], "completion": PROMPTS[2]}]
    encoded = examples.encode(rows)
    batch = examples.collate(encoded)
    real = len(encoded[0]["input_ids"])
    assert batch["attention_mask"][0].tolist() == [1] * real + [0] * (batch["input_ids"].shape[1] - real)
    assert batch["input_ids"][0, :real].tolist() == encoded[0]["input_ids"]
    assert batch["labels"][0, real:].unique().tolist() == [IGNORED]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert tokenizer.padding_side == side
    assert (tokenizer.pad_token_id is not None) == has_pad


def test_padding_in_a_batch_changes_no_loss() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    model = tiny_t5(tokenizer, dropout=0.0)
    examples = Examples(model, tokenizer, max_prompt_length=None, max_completion_length=32)
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": PROMPTS[1], "completion": PROMPTS[2]}]
    encoded = examples.encode(rows)
    counts = [len(row["labels"]) for row in encoded]
    alone = [model(**examples.collate([row])).loss.item() for row in encoded]
    together = model(**examples.collate(encoded)).loss.item()
    assert together == pytest.approx(sum(a * c for a, c in zip(alone, counts, strict=True)) / sum(counts), rel=1e-5)


def test_sft_refuses_long_answers_chats_without_template_and_wrong_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write(tmp_path / "chat.jsonl", [row | {"completion": "yes"} for row in prompt_rows(2, chat=True)])
    texts = write(tmp_path / "text.jsonl", [{"prompt": "a", "completion": "long " * 50}])
    model = save(tmp_path / "model", "t5")
    base = ["sft", "--model", model, "--output_dir", str(tmp_path / "out"), *CHEAP]
    assert main([*base, "--train_dataset", chats]) == 2
    assert "chat template" in capsys.readouterr().err
    assert main([*base, "--train_dataset", texts, "--max_completion_length", "8"]) == 3
    assert "max_completion_length=8" in capsys.readouterr().err
    assert main([*base, "--train_dataset", texts, "--learning_rat", "1"]) == 2
    assert "'learning_rate'" in capsys.readouterr().err
    assert main([*base, "--train_dataset", texts, "--lora_r", "4"]) == 2
    assert "use_peft" in capsys.readouterr().err
    assert main(["sft", "--train_dataset", texts]) == 2
    assert main([*base, "--train_dataset", "EdinburghNLP/xsum"]) == 3
    assert "recipes/prepare.py" in capsys.readouterr().err


def test_the_saved_adapter_names_its_base(tmp_path: Path) -> None:
    data = write(tmp_path / "sft.jsonl", [row | {"completion": "x"} for row in prompt_rows(4)])
    model = save(tmp_path / "model", "causal")
    command = ["sft", "--model", model, "--train_dataset", data, "--output_dir", str(tmp_path / "out"), "--use_peft"]
    assert main([*command, "--max_steps", "1", "--max_completion_length", "8", *CHEAP]) == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == model
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_evaluations_are_shown_and_so_is_the_step_whose_weights_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "sft.jsonl", [row | {"completion": "blue"} for row in prompt_rows(4)])
    held_out = write(tmp_path / "held-out.jsonl", [row | {"completion": "red"} for row in prompt_rows(4)])
    command = ["sft", "--model", save(tmp_path / "model", "causal"), "--train_dataset", data]
    command += ["--eval_dataset", held_out, "--output_dir", str(tmp_path / "out"), "--max_completion_length", "8"]
    command += ["--max_steps", "4", "--learning_rate", "0.1", *CHEAP]
    for name in ("eval", "save"):
        command += [f"--{name}_strategy", "steps", f"--{name}_steps", "1"]
    assert main([*command, "--load_best_model_at_end", "true"]) == 0
    said = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("step") and "held-out" in line]
    assert len(losses) == 4
    best = 1 + losses.index(min(losses))
    assert best < 4
    facts = json.loads((tmp_path / "out" / "sft.json").read_text())
    assert (facts["steps"], facts["weights_of_step"]) == (4, best)
    assert f"weights: of step {best}" in said
    assert facts["held_out_loss"]["after"] == pytest.approx(min(losses), abs=1e-3)


def test_a_fresh_adapter_is_that_of_the_seed(tmp_path: Path) -> None:
    model, rows = save(tmp_path / "model", "causal"), [row | {"completion": "x"} for row in prompt_rows(2)]

    def adapter(seed: int, before: int) -> torch.Tensor:
        torch.manual_seed(before)  # as another process would have been
        args = TrainingArguments(str(tmp_path), seed=seed, use_cpu=True, report_to="none")
        config = LoraConfig(target_modules="all-linear")
        trained: Any = sft_trainer(model, rows, [], args, peft_config=config, max_completion_length=8).model
        return torch.cat([p.flatten() for name, p in trained.named_parameters() if "lora_A" in name])

    first = adapter(3, before=1)
    assert torch.equal(first, adapter(3, before=2))
    assert not torch.equal(first, adapter(4, before=1))


@pytest.mark.parametrize("kind", ["causal", "t5"])
def test_the_held_out_loss_is_a_mean_over_tokens_however_they_are_batched(tmp_path: Path, kind: str) -> None:
    model, answers = save(tmp_path / "model", kind), ["x", "a much longer answer", "blue sky", "red", "cats like it"]
    rows = [row | {"completion": text} for row, text in zip(prompt_rows(5), answers, strict=True)]

    def trainer_of(batch: int) -> Any:
        args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=batch, use_cpu=True, report_to="none")
        return sft_trainer(model, rows, rows, args, max_completion_length=32)

    trainer = trainer_of(1)
    trainer.model.eval()
    alone = [trainer.data_collator([row]) for row in trainer.train_dataset]
    counts = [int((batch["labels"] != IGNORED).sum()) for batch in alone]
    sums = [trainer.model(**batch).loss.item() * count for batch, count in zip(alone, counts, strict=True)]
    assert len(set(counts)) > 2
    for batch in (1, 2, 5):
        assert trainer_of(batch).evaluate()["eval_loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
