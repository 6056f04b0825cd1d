"""What is loaded, in which precision and with what dropout, and what cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_causal
from transformers import LlamaForCausalLM, PegasusConfig, PegasusForConditionalGeneration

from bondlm.data.prompts import load_prompts
from bondlm.errors import BondError, ConfigError
from bondlm.models.adapters import save_adapter, wrap_adapter
from bondlm.models.load import _check_whole, disable_dropout, fast_dtype, load_model, load_tokenizer
from bondlm.rewards import load_rewards
from bondlm.stages.reward_model import load_base
from models.families import build
from models.test_adapters import KINDS, START_ELSEWHERE, learn
from models.test_roles import MODELS, TOKENIZER, logits, lora, shake, trainable


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_disable_dropout(kind: str) -> None:
    model = MODELS[kind](TOKENIZER, dropout=0.5)
    expected = logits(model)
    model.train()
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    disable_dropout(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


def test_disable_dropout_of_attention_and_adapters() -> None:
    model = tiny_causal(TOKENIZER)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    peft_model = wrap_adapter(model, lora(lora_dropout=0.5))
    shake(peft_model, "lora_B")
    expected = logits(peft_model.eval())
    peft_model.train()
    assert not torch.allclose(logits(peft_model), expected, atol=1e-3)
    disable_dropout(peft_model)
    torch.testing.assert_close(logits(peft_model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_load_model_of_every_kind(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind](TOKENIZER)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_model_of_an_adapter_folder(tmp_path: Path) -> None:
    base = tiny_causal(TOKENIZER)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(load_model(tmp_path / "base", dtype=torch.float32), lora())
    shake(model, "lora_B")
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = load_model(tmp_path / "adapter", dtype=torch.float32)
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert trainable(loaded) == trainable(model)


def pickled(folder: Path) -> None:
    model = tiny_causal(TOKENIZER)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def adapter_of_nothing(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, r"config\.json"),
        (pickled, r"model\.safetensors"),
        (adapter_of_nothing, r"adapter_config\.json"),
    ],
    ids=["empty", "pickle only", "adapter without base"],
)
def test_what_cannot_be_loaded_is_a_config_error(prepare: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(tmp_path, dtype=torch.float32)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_that_is_not_there_is_missed_by_its_own_name(tmp_path: Path) -> None:
    """transformers speaks of repo ids, and of packages that a slow tokenizer would need."""
    tiny_causal(TOKENIZER).save_pretrained(tmp_path)
    for name, what in (("", "processing_class"), (str(tmp_path), "tokenizer of the model")):
        with pytest.raises(ConfigError, match=what) as caught:
            load_tokenizer(name)
        assert not any(word in str(caught.value) for word in ("epo id", "sentencepiece", "hub"))
    TOKENIZER.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == TOKENIZER.get_vocab()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer of the model"):
        load_tokenizer(str(tmp_path))


def test_what_may_be_a_folder_or_a_name_of_the_hub_is_looked_for_here_first() -> None:
    """Whose folder is missing is told so, and not to check an internet connection."""
    loads: list[Callable[[str], Any]] = [
        lambda name: load_model(name, dtype=torch.float32),
        load_prompts,
        lambda name: load_rewards([name], device=torch.device("cpu")),
        load_base,
    ]
    for load in loads:
        with pytest.raises(BondError, match=r"no-such-name.*no file or folder of that name here") as caught:
            load("no-such-name")
        assert "internet" not in str(caught.value)


def test_fast_dtype_is_bf16_only_where_the_hardware_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, expected in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert fast_dtype(torch.device("cpu")) == expected
    assert fast_dtype(torch.device("mps")) == torch.float32


# -- files that are damaged, or do not fit each other


def weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write the folder's weights anew."""
    path = next(folder.glob("*model.safetensors"))
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def config(folder: Path, **changes: Any) -> None:
    path = next(folder.glob("*config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: weights(folder, lambda held: {k: v for k, v in held.items() if part not in k})


def cut(folder: Path) -> None:
    path = next(folder.glob("*model.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def renamed(folder: Path) -> None:
    weights(folder, lambda held: {k.replace("model.layers", "model.text.layers"): v for k, v in held.items()})


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no head": (without("lm_head"), r"lm_head\.weight.*random numbers"),
    "no mlp": (without("layers.1.mlp"), r"layers\.1\.mlp\.down_proj\.weight.*random numbers"),
    "other names": (renamed, r"layers\.0.*and 15 more.*fit nowhere.*model\.text\.layers\.0"),
    "more layers": (lambda folder: config(folder, num_hidden_layers=3), r"layers\.2.*random numbers"),
    "other shapes": (lambda folder: config(folder, intermediate_size=8), r"down_proj\.weight \(shape \(32, 64\)"),
    "cut": (cut, "SafetensorError"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b"") and None, "SafetensorError"),
    "no such activation": (lambda folder: config(folder, hidden_act="sil"), "sil"),
    "a word for a number": (lambda folder: config(folder, num_hidden_layers="two"), "num_hidden_layers"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_checkpoint_that_is_not_whole_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers draws what is missing at random, other numbers at each load."""
    damage, message = DAMAGED[kind]
    tiny_causal(TOKENIZER).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(tmp_path, dtype=torch.float32)
    assert str(tmp_path) in str(caught.value)


def test_sinusoids_are_not_missing(tmp_path: Path) -> None:
    """Pegasus of older versions of transformers; they are computed again."""
    shape = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1}
    config = PegasusConfig(vocab_size=60, decoder_layers=1, max_position_embeddings=32, **shape)
    model = PegasusForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    tables = {name for name in whole if "embed_positions" in name}
    save_file({k: v for k, v in whole.items() if k not in tables}, file, metadata={"format": "pt"})
    loaded = load_model(tmp_path, dtype=torch.float32).state_dict()
    assert len(tables) == 2
    assert all(torch.equal(loaded[name], whole[name]) for name in tables)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "lm_head"], ["q_proj", "lm_head"]])
def test_a_larger_vocabulary_under_an_adapter_is_loaded_again(targets: list[str], tmp_path: Path) -> None:
    """Or not, where PEFT saves only one end of it: the other's new rows would be random."""
    tiny_causal(TOKENIZER).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 20, mean_resizing=False)
    model = get_peft_model(base, lora(target_modules=targets))
    save_adapter(model, tmp_path / "run")
    if targets == ["q_proj", "lm_head"]:
        with pytest.raises(ConfigError, match=r"320 rows of lm_head, 300 in the base, and no model\.embed_tokens"):
            load_model(tmp_path / "run", dtype=torch.float32)
    else:
        assert torch.equal(logits(load_model(tmp_path / "run", dtype=torch.float32)), logits(model))


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    model = MODELS["gpt2"](TOKENIZER)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(load_model(tmp_path, dtype=torch.float32)), logits(model))


DAMAGED_ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no layer": (without("layers.1"), r"its file has no base_model\.model\.model\.layers\.1"),
    "other names": (renamed, r"its file has no base_model\.model\.model\.layers\.0"),
    "other layers too": (
        lambda folder: weights(folder, lambda held: held | {"base_model.model.more.lora_A.weight": torch.ones(2, 2)}),
        r"its file has base_model\.model\.more",
    ),
    "no whole module": (without("lm_head"), "lm_head"),
    "other shapes": (
        lambda folder: weights(folder, lambda held: {k: v[:2].contiguous() for k, v in held.items()}),
        "2 rows of lm_head, 300 in the base",
    ),
    "another base": (lambda folder: config(folder, target_modules=["c_attn"]), "does not fit its base"),
    "cut": (cut, "SafetensorError"),
    "no such kind": (lambda folder: config(folder, peft_type="NEWKIND"), "NEWKIND"),
}


@pytest.mark.parametrize("kind", DAMAGED_ADAPTERS)
def test_an_adapter_that_does_not_fit_its_base_is_refused(kind: str, tmp_path: Path) -> None:
    """PEFT leaves what is missing at zero."""
    damage, message = DAMAGED_ADAPTERS[kind]
    tiny_causal(TOKENIZER).save_pretrained(tmp_path / "base")
    model = get_peft_model(load_model(tmp_path / "base", dtype=torch.float32), lora(modules_to_save=["lm_head"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    load_model(tmp_path / "adapter", dtype=torch.float32)
    damage(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(tmp_path / "adapter", dtype=torch.float32)
    assert str(tmp_path / "adapter") in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS | START_ELSEWHERE)
def test_an_adapter_of_any_kind_is_whole(kind: str, tmp_path: Path) -> None:
    """What is asked of its file is what it is saved with."""
    torch.manual_seed(0)
    tiny_causal(TOKENIZER).save_pretrained(tmp_path / "base")
    model = wrap_adapter(load_model(tmp_path / "base", dtype=torch.float32), (KINDS | START_ELSEWHERE)[kind])
    learn(model)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(load_model(tmp_path, dtype=torch.float32)), logits(model), atol=1e-5, rtol=0)


def test_out_of_memory_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **how: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    tiny_causal(TOKENIZER).save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", load)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("family", ["encoder-decoder", "llama", "bart", "gemma3", "gpt2"])
def test_whole_models_of_all_kinds_of_configs_can_be_trained(family: str) -> None:
    """Not every config says whether head and embedding are one."""
    _check_whole(build(family))
