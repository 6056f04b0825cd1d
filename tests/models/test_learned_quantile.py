"""The learned quantile: its loss, its limits, and its features."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from transformers import BartConfig, BartForConditionalGeneration

from bondlm.errors import ResourceError
from bondlm.models import logprobs
from bondlm.models.learned_quantile import QuantileModel, completion_features
from models.helpers import ROWS
from models.test_logits_budget import rows_seen

CPU = torch.device("cpu")


def test_it_begins_at_one_half_and_its_first_loss_is_log_two() -> None:
    model = QuantileModel(3, learning_rate=1e-3, seed=0)
    features = torch.randn(5, 6)
    torch.testing.assert_close(model.log_quantile(features), torch.full((5,), math.log(0.5)))
    assert model.update(features, torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])) == pytest.approx(math.log(2))


def test_single_comparisons_teach_the_quantile() -> None:
    """Labels are coin flips of the true quantile, one a completion; the model finds the quantile itself."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(8, generator=generator)
    model = QuantileModel(4, learning_rate=3e-3, seed=0)

    def true(features: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(features @ direction / 2)

    for _ in range(600):
        features = torch.randn(64, 8, generator=generator)
        model.update(features, torch.bernoulli(true(features), generator=generator))
    fresh = torch.randn(2000, 8, generator=generator)
    error = model.log_quantile(fresh).exp() - true(fresh)
    assert float(error.abs().mean()) < 0.08
    assert abs(float(error.mean())) < 0.04


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, other = (QuantileModel(3, learning_rate=1e-3, seed=7) for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_and_moments_come_back_exactly() -> None:
    one, other = (QuantileModel(3, learning_rate=1e-2, seed=s) for s in (0, 1))
    features, labels = torch.randn(6, 6), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    for _ in range(3):
        one.update(features, labels)
    other.load_tensors({name: tensor.clone() for name, tensor in one.tensors().items()})
    for _ in range(2):
        assert one.update(features, labels) == other.update(features, labels)
    assert torch.equal(one.log_quantile(features), other.log_quantile(features))
    with pytest.raises(RuntimeError, match="size mismatch"):
        QuantileModel(4, learning_rate=1e-2, seed=0).load_tensors(one.tensors())


@pytest.mark.parametrize("build", [tiny_causal, tiny_gpt2, tiny_t5])
def test_features_do_not_depend_on_the_batch(build: Callable[..., Any]) -> None:
    model = build(tiny_tokenizer())
    start_id = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    rows = [(list(range(40, 40 + p)), list(range(100, 100 + c))) for p, c in ((3, 7), (9, 1), (5, 4), (12, 9), (4, 2))]
    settings: dict[str, Any] = {"start_id": start_id, "device": CPU}
    together = completion_features(model, rows, 0, batch_rows=3, **settings)
    alone = torch.cat([completion_features(model, [row], 0, **settings) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert together.shape == (5, 2 * model.config.hidden_size)
    one_token = rows.index(rows[1])
    mean, last = together[one_token].chunk(2)
    torch.testing.assert_close(mean, last)  # the mean over one token is that token
    assert not torch.allclose(together[0].chunk(2)[0], together[0].chunk(2)[1])


@pytest.mark.parametrize("build", [tiny_causal, tiny_t5])
def test_features_read_every_token_of_a_completion(build: Callable[..., Any]) -> None:
    """The last one too, which a decoder that is given a completion to predict does not read."""
    model = build(tiny_tokenizer())
    start_id = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    rows = [([40, 41], [100, last]) for last in (101, 102)]
    one, other = completion_features(model, rows, 0, start_id=start_id, device=CPU)
    for part, changed in zip(one.chunk(2), other.chunk(2), strict=True):
        assert not torch.allclose(part, changed)


def test_features_of_a_decoder_with_a_table_of_positions() -> None:
    """A completion that fills the table has no column left for its last token."""
    shape = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    config = BartConfig(vocab_size=60, encoder_layers=1, decoder_layers=1, max_position_embeddings=6, **shape)
    rows = [([40, 41], [50, 51, 52, 53, 54, 55]), ([40], [50])]
    features = completion_features(BartForConditionalGeneration(config).eval(), rows, 1, start_id=2, device=CPU)
    assert features.isfinite().all()


def test_out_of_memory_halves_the_rows_and_changes_no_feature() -> None:
    model = tiny_causal(tiny_tokenizer())
    expected = completion_features(model, ROWS, 0, start_id=None, device=CPU)
    rows_seen(model, most=3)
    with pytest.warns(UserWarning, match=r"out of memory.*\b8 completions.*\b4\b"):
        found = completion_features(model, ROWS, 0, start_id=None, device=CPU)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:bondlm. out of memory")
def test_not_even_one_row_says_what_to_do() -> None:
    model = tiny_causal(tiny_tokenizer())
    rows_seen(model, most=0)
    with pytest.raises(ResourceError, match=r"out of memory.* tokens.*max_completion_length"):
        completion_features(model, ROWS, 0, start_id=None, device=CPU)


@pytest.mark.parametrize(("build", "is_cut"), [(tiny_causal, False), (tiny_t5, True)])
def test_a_model_that_makes_all_logits_stays_within_their_budget(
    build: Callable[..., Any], is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_tokenizer())
    seen = rows_seen(model)
    monkeypatch.setattr(logprobs, "positions_in_budget", lambda size: 20)
    start_id = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    completion_features(model, ROWS, 0, start_id=start_id, device=CPU)
    assert (max(seen) < 8) == is_cut


def test_an_accelerators_generator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` sets it too, and a run on a GPU draws from it."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA's generators were seeded"))
    QuantileModel(4, learning_rate=1e-3, seed=0)
