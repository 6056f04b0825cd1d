"""Facts of a model's text: one place that asks its config, whatever else the model sees, hears or encodes.

A model that sees images keeps the facts of its language model in a config within its config, an encoder-decoder model
those of its decoder, and some models have other values in each layer.
"""

import inspect
from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any

# Layers whose state has no column for each token; padding that enters it stays in it.
RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent"}


def text_config(config: Any) -> Any:
    """The config of what writes text: the model's own, that of its language model, or that of its decoder."""
    return config.get_text_config(decoder=True)


def decoder_config(model: Any) -> Any:
    """The config of what decodes: of an encoder-decoder model the decoder's own, which may have other layers.

    T5's own config counts the encoder's layers, and a cache made from it would be too short for a deeper decoder.
    """
    owner = model.get_decoder() if model.config.is_encoder_decoder else model
    return text_config(getattr(owner, "config", model.config))


def vocabulary_size(config: Any) -> int:
    """Entries of the language model's vocabulary."""
    text = text_config(config)
    return int(getattr(text, "vocab_size", None) or text.tgt_vocab_size)


def hidden_size(config: Any) -> int:
    """Numbers of a last hidden state."""
    text = text_config(config)
    return int(getattr(text, "hidden_size", None) or text.d_model)


def layer_kinds(config: Any) -> list[str]:
    """What each layer does with earlier tokens, as `layer_types` names it; ["full_attention"] where nothing is said."""
    return list(getattr(text_config(config), "layer_types", None) or ["full_attention"])


def is_recurrent(config: Any) -> bool:
    """Whether some layer keeps a state instead of keys and values, as far as its config says."""
    return bool(RECURRENT & set(layer_kinds(config)))


def has_full_attention(config: Any) -> bool:
    """Whether every layer sees every earlier token: no sliding window, no recurrence, no encoder."""
    if config.is_encoder_decoder or set(layer_kinds(config)) != {"full_attention"}:
        return False
    return not any(getattr(layer, "sliding_window", None) for layer in layer_configs(config))


def layer_configs(config: Any) -> Iterator[Any]:
    """The text's config as each layer sees it; once where all layers are alike."""
    text = text_config(config)
    if getattr(text, "is_heterogeneous", False):
        yield from text.per_layer_config
    else:
        yield text


def takes_argument(model: Any, name: str) -> bool:
    """Whether the transformers model, inside whatever wraps it, names this argument of its forward pass."""
    while inner := vars(model).get("_modules", {}).get("module") or vars(model).get("_modules", {}).get("_orig_mod"):
        model = inner  # DDP, DeepSpeed, torch.compile
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in _arguments(type(core))  # type: ignore[arg-type]


@cache
def _arguments(model_class: Hashable) -> set[str]:
    return set(inspect.signature(model_class.forward).parameters)  # type: ignore[attr-defined]
