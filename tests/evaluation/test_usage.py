"""What the model card tells a stranger to type: it runs, and the model answers as `bondlm sample` does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.helpers import write_job
from rewards.small_models import saved
from tiny import tiny_causal
from trainer.helpers import TOKENIZER, lora, trainer
from transformers import GenerationConfig

from bondlm.cli import main
from bondlm.evaluation.usage import usage


def snippet(card: Path) -> str:
    (code,) = re.findall(r"## How to use\n\n```python\n(.*?)```", card.read_text(encoding="utf-8"), re.S)
    return str(code)


@pytest.mark.parametrize("kind", ["causal", "t5"])
def test_the_cards_code_answers_as_the_run_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter of a chat model, and a whole encoder-decoder that reads text."""
    monkeypatch.chdir(tmp_path)
    config = write_job(tmp_path, kind=kind, output_dir="run", max_steps=2)
    assert main(["train", "--config", str(config)]) == 0
    # The card's code computes in the folder's own dtype; where processors have bf16 the command would not.
    short = ["--max_completion_length", "8", "--output", "greedy.jsonl", "--dtype", "float32"]
    assert main(["sample", "--model", "run", "--prompt", "What is rain?", "--temperature", "0", *short]) == 0
    expected = json.loads(Path("greedy.jsonl").read_text())["completion"]
    capsys.readouterr()
    code = snippet(tmp_path / "run" / "README.md")
    assert ("apply_chat_template" in code) == (kind == "causal")
    answering = GenerationConfig.from_pretrained("run")
    assert (answering.do_sample, answering.temperature, answering.top_k, answering.top_p) == (True, 1.0, 0, 1.0)
    assert answering.max_new_tokens == 8
    greedy = code.replace("generate(**inputs)", "generate(**inputs, do_sample=False)")
    assert greedy != code
    exec(greedy, {})
    assert capsys.readouterr().out == f"{expected}\n"
    exec(code, {})  # as it stands: one sample


def test_the_code_for_an_adapter_answers_by_the_distribution_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DoRA adapter, of which transformers' own loader drops a part, on a base that penalises and bans tokens."""
    monkeypatch.chdir(tmp_path)
    base = tiny_causal(TOKENIZER)
    base.generation_config.update(num_beams=3, do_sample=True, suppress_tokens=[5, 6], min_new_tokens=4)
    base.generation_config.update(repetition_penalty=1.5, no_repeat_ngram_size=2)
    saved(tmp_path / "base", base, TOKENIZER)
    made = trainer(Path("run"), "base", peft_config=lora(use_dora=True), dtype="float32", learning_rate=3e-2)
    made.train()
    made.save_model()
    names: dict[str, Any] = {}
    exec(usage(Path("run"), {}).removeprefix("```python").removesuffix("```\n"), names)
    model, ids = names["model"], torch.tensor([[20, 10, 20, 12, 10]])
    with torch.no_grad(), made.roles.use("policy") as policy:
        trained = policy(input_ids=ids).logits[0, -1]
        drawn = model.generate(input_ids=ids, output_scores=True, return_dict_in_generate=True, max_new_tokens=1)
    torch.testing.assert_close(drawn.scores[0][0], trained, atol=1e-4, rtol=0)


def test_a_base_that_samples_otherwise_or_ends_elsewhere_does_not_leak_into_the_folder(tmp_path: Path) -> None:
    config = write_job(tmp_path, max_steps=1, eval_dataset=None)
    path = tmp_path / "model" / "generation_config.json"
    base: dict[str, Any] = json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    path.write_text(json.dumps(base | {"repetition_penalty": 1.3, "eos_token_id": [2, 5]}))
    assert main(["train", "--config", str(config)]) == 0
    answering = GenerationConfig.from_pretrained(tmp_path / "run")
    assert (answering.temperature, answering.top_p, answering.repetition_penalty or 1.0) == (1.0, 1.0, 1.0)
    assert answering.eos_token_id[:2] == [2, 5]
    assert (tmp_path / "run" / "checkpoint-1" / "generation_config.json").is_file()
