"""A quantised base under an adapter: bitsandbytes' 4 bits, which work on a CPU (`make test-qlora`)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_causal
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bondlm.errors import ConfigError
from trainer.helpers import TOKENIZER, ends_often, lora, prompt_rows, trainer

pytest.importorskip("bitsandbytes")

FOUR_BITS: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a processor has bf16, bitsandbytes evaluates in that whatever the compute dtype: sameness has no digits."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    ends_often(tiny_causal(TOKENIZER, hidden=64)).save_pretrained(folder)
    return str(folder)


def quantised() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**FOUR_BITS, bnb_4bit_compute_dtype=torch.float32)


def test_an_adapter_trains_on_a_base_in_four_bits(base: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"dtype": "float32", "max_steps": 2, "eval_dataset": prompt_rows(4)}
    made = trainer(tmp_path, base, quantization_config=quantised(), peft_config=lora(), **how)
    weight = made.roles.core.model.layers[0].self_attn.q_proj.base_layer.weight
    assert weight.dtype == torch.uint8
    before = weight.clone()
    assert made.evaluate()["eval_kl"] == 0.0  # policy and reference are one model
    made.train()
    assert torch.equal(weight, before)
    assert made.evaluate()["eval_kl"] != 0.0
    made.save_model(str(tmp_path / "saved"))

    # What plain transformers and PEFT make of the saved adapter is what was trained.
    again = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantised(), dtype=torch.float32)
    again.load_adapter(str(tmp_path / "saved"))
    ids = torch.tensor([TOKENIZER("red blue").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, made.roles.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_same_from_a_config(base: str, tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": "bitsandbytes", **FOUR_BITS}}
    made = trainer(tmp_path, base, model_init_kwargs=settings, peft_config=lora(), max_steps=1)
    assert made.roles.core.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.uint8
    made.train()


def test_what_cannot_train_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="peft_config"):
        trainer(tmp_path, base, quantization_config=quantised())
    with pytest.raises(ConfigError, match="quantization_config"):
        trainer(tmp_path, tiny_causal(TOKENIZER), quantization_config=quantised(), peft_config=lora())
    twice = {"quantization_config": {"quant_method": "bitsandbytes", **FOUR_BITS}}
    with pytest.raises(ConfigError, match="quantization_config"):
        trainer(tmp_path, base, quantization_config=quantised(), model_init_kwargs=twice, peft_config=lora())
