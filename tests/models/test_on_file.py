"""Whether a model in memory is the one that its name stands for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_causal, tiny_t5, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from bondlm.models.on_file import changed_weight

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_causal(TOKENIZER).save_pretrained(path)
    return path


def load(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_model_is_the_one_on_file_in_any_precision(folder: Path, dtype: torch.dtype) -> None:
    model = load(folder, dtype=dtype)
    assert changed_weight(model) == ""
    assert changed_weight(model.float()) == ""


def test_shards_and_other_classes(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert changed_weight(load(tmp_path / "shards")) == ""
    load(folder).model.save_pretrained(tmp_path / "headless")  # its names lack the prefix
    model = load(tmp_path / "headless")
    assert changed_weight(model) == ""
    with torch.no_grad():
        model.model.norm.weight += 0.1
    assert changed_weight(model) == "model.norm.weight"
    tiny_t5(TOKENIZER).save_pretrained(tmp_path / "t5")
    assert changed_weight(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5")) == ""


def test_a_changed_weight_is_named(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(1 + 1e-6)
    assert changed_weight(model) == "model.layers.0.self_attn.v_proj.weight"


def test_an_adapter_does_not_count_and_what_it_was_merged_into_does(folder: Path) -> None:
    wrapped = get_peft_model(load(folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert changed_weight(wrapped) == ""
    assert changed_weight(wrapped.merge_and_unload()) == "model.layers.0.self_attn.q_proj.weight"


def test_a_larger_vocabulary_does_not_count(folder: Path) -> None:
    model = load(folder)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert changed_weight(model) == ""


def test_without_a_file_nothing_is_said(folder: Path, tmp_path: Path) -> None:
    assert changed_weight(tiny_causal(TOKENIZER)) == ""
    model = load(folder)
    for name in (str(tmp_path / "gone"), "org/model"):
        model.config._name_or_path = name
        assert changed_weight(model) == ""
    (tmp_path / "model.safetensors").write_text("no weights")
    model.config._name_or_path = str(tmp_path)
    assert changed_weight(model) == ""
