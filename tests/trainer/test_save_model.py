"""What a run saves is a plain model or a plain adapter of transformers and PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import prompt_rows, tiny_causal
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from bondlm import BONDTrainer
from trainer.helpers import MODELS, TOKENIZER, config, lora, low_ids, trainer


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.tensor([TOKENIZER.encode("What is two plus three?")])
    extra = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **extra).logits


@pytest.mark.parametrize(("kind", "auto"), [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)])
def test_a_saved_folder_is_a_plain_model(kind: str, auto: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, MODELS[kind](TOKENIZER), learning_rate=1e-2)
    made.train()
    made.save_model()
    loaded = auto.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(made.roles.model))
    assert not torch.allclose(logits(loaded), logits(MODELS[kind](TOKENIZER)), atol=1e-2)  # it was trained
    assert loaded.config.use_cache is made.model.config.use_cache is MODELS[kind](TOKENIZER).config.use_cache is True
    assert AutoTokenizer.from_pretrained(tmp_path).encode("hello") == TOKENIZER.encode("hello")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_saved_adapter_is_a_plain_adapter(kind: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, MODELS[kind](TOKENIZER), learning_rate=1e-2, peft_config=lora(kind))
    made.train()
    made.save_model()
    assert not {"anchor", "reference", "README.md"} & {path.name for path in tmp_path.iterdir()}  # nor PEFT's card
    loaded = PeftModel.from_pretrained(MODELS[kind](TOKENIZER), str(tmp_path))
    assert list(loaded.peft_config) == ["default"]
    with made.roles.use("policy") as policy:
        torch.testing.assert_close(logits(loaded), logits(policy), atol=1e-6, rtol=0)
    assert not torch.allclose(logits(loaded), logits(MODELS[kind](TOKENIZER)), atol=1e-2)


def test_a_run_can_start_from_the_adapter_of_another(tmp_path: Path) -> None:
    tiny_causal(TOKENIZER).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    common: dict[str, Any] = {"learning_rate": 1e-2, "dtype": "float32"}
    first = trainer(tmp_path / "first", str(tmp_path / "base"), peft_config=lora(), **common)
    first.train()
    first.save_model()
    second = BONDTrainer(
        str(tmp_path / "first"), low_ids, config(tmp_path / "second", **common), train_dataset=prompt_rows(8)
    )
    with first.roles.use("policy") as policy, second.roles.use("reference") as reference:
        start = logits(policy)
        torch.testing.assert_close(logits(reference), start, atol=1e-5, rtol=0)
    second.train()
    with second.roles.use("reference") as reference:
        torch.testing.assert_close(logits(reference), start, atol=1e-5, rtol=0)
    with second.roles.use("policy") as policy:
        assert not torch.allclose(logits(policy), start, atol=1e-2)


@pytest.mark.parametrize("peft_config", [None, lora()])
def test_no_file_of_a_saved_run_holds_an_access_token(peft_config: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=peft_config, hub_token="hf_notforothers", save_strategy="steps", save_steps=1)
    made.train()
    made.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.parent.name.startswith("checkpoint-") for path in files)
    assert not [path for path in files if b"hf_notforothers" in path.read_bytes()]


def test_a_card_of_a_run_that_was_not_measured(tmp_path: Path) -> None:
    """Trainer's own: it multiplies the size of evaluation batches, which are all held-out prompts."""
    made = trainer(tmp_path, eval_dataset=prompt_rows(3))
    made.create_model_card(dataset_name="org/prompts")  # TRL's name
    assert "org/prompts" in (tmp_path / "README.md").read_text()
    assert "eval_batch_size: 3" in (tmp_path / "README.md").read_text()
    assert made.args.per_device_eval_batch_size is None
