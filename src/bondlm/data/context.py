"""How a text begins, and how long it may be for a model, by its config."""

from collections.abc import Iterator
from typing import Any

from bondlm.errors import ConfigError

SELECTED = ("index_topk", "keep_window_size")  # how many earlier tokens a layer of sparse attention keeps


def context_length(config: Any) -> int | None:
    """Most tokens of a text, where the config says so; of an encoder-decoder model most tokens of a prompt.

    Of a rope that changes once a text is longer than it was trained for (longrope, dynamic NTK) that length: beyond it
    a token's distribution depends on the length of its batch, and no two ways to compute it agree. Likewise of layers
    that keep only the best so many tokens: which ones is a matter of rounding.
    """
    if config.is_encoder_decoder:
        return _positions(config, "encoder")
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", *SELECTED)
    limits = [*(getattr(text, name, None) for name in names), *_changing_ropes(text)]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known) if known else None


def check_completion_length(config: Any, max_completion_length: int) -> None:
    """A decoder with a table of positions cannot write beyond it.

    Raises:
        ConfigError: it would have to.
    """
    limit = _positions(config, "decoder") if config.is_encoder_decoder else None
    if limit is not None and max_completion_length > limit:
        raise ConfigError(
            f"max_completion_length={max_completion_length}: the decoder of this {config.model_type} has {limit} "
            "positions. Set at most that"
        )


def start_id(model: Any) -> int | None:
    """The token that the decoder of an encoder-decoder model begins with; None for a decoder-only model."""
    if not model.config.is_encoder_decoder:
        return None
    places = (model.config, model.generation_config)
    found = [getattr(config, "decoder_start_token_id", None) for config in places]
    return next((int(token) for token in found if token is not None), None)


def _positions(config: Any, end: str) -> int | None:
    """Positions of the encoder or the decoder; None where they are relative (T5)."""
    for name in (f"max_{end}_position_embeddings", "max_position_embeddings"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _changing_ropes(text: Any) -> Iterator[int | None]:
    """Lengths from which on a rope is another one."""
    parameters = getattr(text, "rope_parameters", None) or {}
    ropes = [parameters] if "rope_type" in parameters else [r for r in parameters.values() if isinstance(r, dict)]
    for rope in ropes:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            yield rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None)
