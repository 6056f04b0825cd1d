"""What a look at the model finds before step 1, and what it says."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_causal, tiny_t5, tiny_tokenizer
from torch import nn
from transformers import BartConfig, BertConfig, EncoderDecoderConfig, MptConfig, Phi3Config, Phi3ForCausalLM

from bondlm.data.context import context_length
from bondlm.data.tokens import length_limits
from bondlm.engines.local.batch_size import automatic_rows
from bondlm.engines.local.probe import find_decoding
from bondlm.errors import ConfigError
from bondlm.models.facts import hidden_size, takes_argument, vocabulary_size
from bondlm.models.load import disable_dropout, load_model
from bondlm.models.probe import agrees, batched_logits, check_model, limits, plain_logits, probe_groups, reach
from bondlm.models.ways import Ways, ways_of
from models.families import VOCABULARY, build

CPU = torch.device("cpu")
TOKENIZER = tiny_tokenizer()


class Jitter(nn.Module):
    """Noise of training that no name gives away, or that a name does."""

    def __init__(self, inner: nn.Module, **rates: float) -> None:
        super().__init__()
        self.inner = inner
        for name, rate in rates.items():
            setattr(self, name, rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y * (1 + 0.3 * torch.randn_like(y)) if self.training else y


def with_noise(**rates: float) -> Any:
    model = tiny_causal(TOKENIZER)
    model.model.layers[0].mlp = Jitter(model.model.layers[0].mlp, **rates)
    return model


def test_noise_is_named_with_its_rate() -> None:
    with pytest.raises(ConfigError, match=r"Llama.*training mode.*gate_jitter=0.3"):
        check_model(with_noise(gate_jitter=0.3), CPU)
    with pytest.raises(ConfigError, match=r"no name for"):
        check_model(with_noise(), CPU)
    assert check_model(with_noise(), CPU, is_noise_allowed=True)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_and_nothing_is_counted_as_a_gradient(training: bool) -> None:
    model = tiny_causal(TOKENIZER).train(training)
    assert check_model(model, CPU)
    find_decoding(model)
    assert model.training == training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "family", ["seed_oss", "starcoder2", "bart", "m2m_100", "falcon", "bloom", "phimoe", "mixtral"]
)
def test_noise_of_every_kind_is_disabled(family: str) -> None:
    """Residual, activation and layer dropout, a router's jitter, and rates that a layer asks its config for."""
    model = build(family)
    with pytest.raises(ConfigError, match="training mode"):
        check_model(model, CPU)
    before = model.config.to_json_string()
    disable_dropout(model)
    check_model(model, CPU)
    assert model.config.to_json_string() == before  # what is saved keeps its rates


def test_a_model_that_sees_what_follows_is_refused() -> None:
    model = build("bert")
    model.config.is_decoder = False
    for layer in model.bert.encoder.layer:
        layer.attention.self.is_causal = False
    model.bert.config.is_decoder = False
    with pytest.raises(ConfigError, match="attends to later tokens"):
        check_model(model, CPU, is_noise_allowed=True)


def test_a_decoder_without_a_first_token_is_refused() -> None:
    model = tiny_t5(TOKENIZER)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    for ask in (lambda: check_model(model, CPU), lambda: find_decoding(model)):
        with pytest.raises(ConfigError, match="decoder_start_token_id"):
            ask()


def test_a_forced_first_token_is_refused_unless_the_decoder_starts_with_it_or_it_is_bos() -> None:
    """NLLB and mBART-50 get the language to write in so; BART writes its BOS by itself."""
    model = tiny_t5(TOKENIZER)
    model.generation_config.forced_bos_token_id = 250
    for ask in (lambda: check_model(model, CPU), lambda: find_decoding(model)):
        with pytest.raises(ConfigError, match=r"forced_bos_token_id.*decoder_start_token_id: 250"):
            ask()
    for name in ("bos_token_id", "decoder_start_token_id"):
        before = getattr(model.config, name)
        setattr(model.config, name, 250)
        find_decoding(model)
        setattr(model.config, name, before)


def test_attention_that_counts_columns_is_found_where_padding_parts_them() -> None:
    """gpt_neo's window and mpt's ALiBi count columns: a common beginning with padding behind it moves them."""
    for family in ("gpt_neo", "mpt"):
        model = build(family)
        disable_dropout(model)
        ways = find_decoding(model)
        assert ways.cached
        assert not ways.prefix
        assert not check_model(model, CPU)
    assert reach(build("gpt_neo")) > limits(build("gpt_neo").config)["window_size"]


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "mixtral"])
def test_rounding_in_bf16_costs_no_way(family: str) -> None:
    """Mamba's logits are fp32 whatever it computes in."""
    model = build(family).to(torch.bfloat16)
    disable_dropout(model)
    ways = find_decoding(model)
    assert ways.padded
    assert ways.cached
    check_model(model, CPU)


def test_a_flat_model_hides_nothing() -> None:
    """What is wrong in a fresh model by a thousandth of a nat is wrong by whole nats once it has learned."""
    model = build("mpt")
    disable_dropout(model)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(0.02)  # the head too: its distributions are nearly uniform
    assert not check_model(model, CPU)


@pytest.mark.parametrize(
    ("family", "ways"),
    [
        ("llama", Ways(prefix=True, padded=True, cached=True)),
        ("mamba", Ways(prefix=False, padded=True, cached=True)),
        ("qwen3_next", Ways(prefix=False, padded=True, cached=True)),
        ("roformer", Ways(prefix=False, padded=False, cached=True)),
        ("recurrent_gemma", Ways(prefix=False, padded=False, cached=False)),
    ],
)
def test_the_fastest_exact_way_of_decoding(family: str, ways: Ways, caplog: pytest.LogCaptureFixture) -> None:
    model = build(family)
    disable_dropout(model)
    with caplog.at_level(logging.INFO, "bondlm"):
        assert find_decoding(model) == ways
    assert ways_of(model) == ways_of(build(family)) == ways  # the anchor and the reference are of the same kind
    slower = not (ways.padded and ways.cached)
    assert any("is decoded" in record.message for record in caplog.records) == slower


def test_a_way_that_the_model_cannot_take_does_not_agree() -> None:
    model = tiny_causal(TOKENIZER)
    groups = probe_groups(model)
    plain = plain_logits(model, groups, CPU)
    assert agrees(lambda: batched_logits(model, groups, CPU), plain, is_low=False)

    def fails() -> Any:
        raise NotImplementedError("no such mask")

    assert not agrees(fails, plain, is_low=False)
    with pytest.raises(RuntimeError, match="out of memory"):
        agrees(lambda: (_ for _ in ()).throw(RuntimeError("CUDA out of memory. Tried")), plain, is_low=False)


def longrope(original: int) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = Phi3Config(
        **sizes,
        **heads,
        original_max_position_embeddings=original,
        rope_parameters=rope,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Phi3ForCausalLM(config).eval()


def test_a_rope_that_changes_with_length_ends_a_text() -> None:
    model = longrope(64)
    assert context_length(model.config) == 64
    assert length_limits(model.config, None, 16)["context_length"] == 64
    assert context_length(tiny_causal(TOKENIZER).config) == 256


def test_a_decoder_writes_no_more_than_it_has_positions() -> None:
    config = BartConfig(max_position_embeddings=64)
    assert length_limits(config, None, 64)["context_length"] == 64
    with pytest.raises(ConfigError, match=r"max_completion_length=65.*64 positions"):
        length_limits(config, None, 65)
    assert length_limits(tiny_t5(TOKENIZER).config, None, 10_000)["context_length"] is None


def test_positions_of_parts_with_a_config_of_their_own() -> None:
    small, large = (BertConfig(max_position_embeddings=size).to_dict() for size in (32, 48))
    config = EncoderDecoderConfig(encoder=small, decoder=large, decoder_start_token_id=1)
    config.is_encoder_decoder = True
    assert length_limits(config, None, 48)["context_length"] == 32
    with pytest.raises(ConfigError, match=r"max_completion_length=49.*48 positions"):
        length_limits(config, None, 49)
    assert context_length(MptConfig(max_seq_len=40)) == 40


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "qwen3_5", "llama4", "fsmt", "mamba", "encoder-decoder"])
def test_facts_of_the_text(family: str) -> None:
    model = build(family)
    assert vocabulary_size(model.config) == VOCABULARY
    assert hidden_size(model.config) == 32
    assert automatic_rows(model, 100) >= 1
    assert not takes_argument(model, "nonsense")


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_text_of_a_multimodal_model_loads_by_folder(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    assert type(load_model(tmp_path, dtype=torch.float32)) is type(build(family))


def test_a_model_that_is_known_by_what_it_sees_alone_loads_by_folder(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText, MistralConfig, PixtralVisionConfig

    text = MistralConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 8
    sees = PixtralVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model("mistral3", text_config=text, vision_config=sees)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    assert type(model).__name__ == "Mistral3ForConditionalGeneration"
    find_decoding(model)
    check_model(model, CPU)


@pytest.mark.parametrize(
    "broken",
    [
        lambda out: out * torch.nan,
        lambda out: out.index_fill(-1, torch.tensor([50]), torch.inf),
        lambda out: out - torch.inf,
    ],
)
def test_logits_that_are_not_finite_are_refused(broken: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """NaN compared with NaN: all ways would seem to agree."""
    model = tiny_causal(TOKENIZER)
    model.lm_head.register_forward_hook(lambda _, __, out: broken(out))
    for look in (lambda: check_model(model, CPU, is_noise_allowed=True), lambda: find_decoding(model)):
        with pytest.raises(ConfigError, match="not finite"):
            look()


def test_a_token_that_a_model_bans_is_no_fault() -> None:
    model = tiny_causal(TOKENIZER)
    model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([50]), -torch.inf))
    plain = plain_logits(model, probe_groups(model), CPU)
    assert (plain[0][:, 50] == -torch.inf).all()
