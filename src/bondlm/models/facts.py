"""Facts about a model's text part from its config, also for models that see, hear or encode something else.

A model that sees images has the facts of its language model in a nested config, an encoder-decoder model has those of
its decoder, and some models have different values in each layer.
"""

import inspect
from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any

from bondlm.errors import ConfigError

# Layers whose state has no column per token, so padding that enters the state stays in it.
RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent"}


def name_of(model: Any) -> str:
    """The folder or hub name that a model object was loaded from; empty if it was made in memory.

    Raises:
        ConfigError: it is no model of transformers.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "_name_or_path"):
        raise ConfigError(
            f"model is a {type(model).__name__}: give a model of transformers or PEFT, a folder, or a hub name"
        )
    return str(config._name_or_path)


def text_config(config: Any) -> Any:
    """The config of the part that writes text: the model's own, that of its language model, or that of its decoder."""
    return config.get_text_config(decoder=True)


def decoder_config(model: Any) -> Any:
    """The config of the part that decodes: for an encoder-decoder model the decoder's, which may have other layers.

    T5's own config counts the encoder's layers, and a cache made from it would be too short for a deeper decoder.
    """
    owner = model.get_decoder() if model.config.is_encoder_decoder else model
    return text_config(getattr(owner, "config", model.config))


def vocabulary_size(config: Any) -> int:
    """Entries of the language model's vocabulary."""
    text = text_config(config)
    return int(getattr(text, "vocab_size", None) or text.tgt_vocab_size)


def hidden_size(config: Any) -> int:
    """Dimensions of the last hidden state."""
    text = text_config(config)
    return int(getattr(text, "hidden_size", None) or text.d_model)


def layer_kinds(config: Any) -> list[str]:
    """What each layer does with earlier tokens, as named in `layer_types`; by default ["full_attention"]."""
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
    """The text config for each layer; only one if all layers are alike."""
    text = text_config(config)
    if getattr(text, "is_heterogeneous", False):
        yield from text.per_layer_config
    else:
        yield text


def takes_argument(model: Any, name: str) -> bool:
    """Whether the forward pass of the transformers model, inside any wrappers, has this argument."""
    while inner := vars(model).get("_modules", {}).get("module") or vars(model).get("_modules", {}).get("_orig_mod"):
        model = inner  # DDP, DeepSpeed, torch.compile
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in _arguments(type(core))  # type: ignore[arg-type]


@cache
def _arguments(model_class: Hashable) -> set[str]:
    return set(inspect.signature(model_class.forward).parameters)  # type: ignore[attr-defined]
