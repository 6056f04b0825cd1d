"""The start token and the maximum length of texts for a model, from its config."""

from collections.abc import Iterator
from typing import Any

from bondlm.errors import ConfigError

SELECTED = ("index_topk", "keep_window_size")  # number of earlier tokens that a sparse-attention layer keeps


def context_length(config: Any) -> int | None:
    """Maximum tokens of a text, if the config states it; for an encoder-decoder model, of a prompt.

    For a rope that changes once a text is longer than in training (longrope, dynamic NTK), it is the training length:
    beyond it a token's distribution depends on the length of its batch, and different ways to compute it disagree. The
    same holds for layers that keep only a number of best tokens, since rounding decides which.
    """
    if config.is_encoder_decoder:
        return positions(config, "encoder")
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len", *SELECTED)
    limits = [*(getattr(text, name, None) for name in names), *_changing_ropes(text)]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known) if known else None


def check_completion_length(config: Any, max_completion_length: int) -> None:
    """Check that a decoder with a position table does not have to write beyond it.

    Raises:
        ConfigError: it would have to.
    """
    limit = positions(config, "decoder") if config.is_encoder_decoder else None
    if limit is not None and max_completion_length > limit:
        raise ConfigError(
            f"max_completion_length={max_completion_length}: the decoder of this {config.model_type} has {limit} "
            "positions. Set at most that"
        )


def start_id(model: Any) -> int | None:
    """The first token of an encoder-decoder model's decoder; None for a decoder-only model."""
    if not model.config.is_encoder_decoder:
        return None
    places = (model.config, model.generation_config)
    found = [getattr(config, "decoder_start_token_id", None) for config in places]
    return next((int(token) for token in found if token is not None), None)


def positions(config: Any, end: str) -> int | None:
    """Positions of the encoder or the decoder; None if they are relative (T5)."""
    name, part = "max_position_embeddings", getattr(config, end, None)  # a config of its own in EncoderDecoderModel
    known = [getattr(config, f"max_{end}_position_embeddings", None), *(getattr(c, name, None) for c in (config, part))]
    return next((limit for limit in known if isinstance(limit, int) and limit > 0), None)


def _changing_ropes(text: Any) -> Iterator[int | None]:
    """Lengths from which a rope changes."""
    parameters = getattr(text, "rope_parameters", None) or {}
    ropes = [parameters] if "rope_type" in parameters else [r for r in parameters.values() if isinstance(r, dict)]
    for rope in ropes:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            yield rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None)
