"""Check that a tokenizer's ids, a model's embedding and its head fit together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bondlm.errors import ConfigError, DataError, listed


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many token ids a model reads in a prompt and in a completion, and how many it writes; None: unknown."""

    prompt: int | None = None
    completion: int | None = None
    head: int | None = None

    @classmethod
    def of_model(cls, model: Any) -> "Sizes":
        """The sizes of a transformers model; in an encoder-decoder model the decoder reads completions."""
        prompt = completion = _rows(model.get_input_embeddings())
        if model.config.is_encoder_decoder:
            find = getattr(model.get_decoder(), "get_input_embeddings", None)
            completion = None if find is None else _rows(find())
        return cls(prompt=prompt, completion=completion, head=_rows(model.get_output_embeddings()))


def check_vocabulary(model: Any, tokenizer: Any, eos_ids: Sequence[int]) -> Sizes:
    """Compare the sizes of tokenizer, embedding, head and config before anything is sampled.

    A tokenizer may have more tokens than the model (Gemma's image token); `check_ids` refuses prompts with these.

    Raises:
        ConfigError: a sampled token could not be read back, the model could never write an end-of-sequence token, or
            the saved model could not be loaded again.
    """
    sizes = Sizes.of_model(model)
    said = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if sizes.head is None:
        return sizes
    if sizes.completion is not None and sizes.head > sizes.completion:
        raise ConfigError(
            f"the model's head writes {sizes.head} tokens and its embedding reads {sizes.completion}: a sampled token "
            "could not be read back. Resize both with `model.resize_token_embeddings`"
        )
    if said is not None and not model.config.is_encoder_decoder and said != sizes.head:
        raise ConfigError(
            f"the config says vocab_size={said} and the model's head has {sizes.head} tokens: what a run saves "
            "could not be loaded. Resize with `model.resize_token_embeddings`, which sets both"
        )
    for token_id in eos_ids:
        if token_id >= sizes.head:
            raise ConfigError(
                f"the end-of-sequence token {_name(token_id, tokenizer)} is not among the {sizes.head} tokens that "
                f"the model has: {_advice(tokenizer)}"
            )
    return sizes


def check_ids(
    rows: Sequence[Sequence[int]],
    size: int | None,
    tokenizer: Any,
    what: str,
    where: Callable[[int], str] = "row {}".format,
) -> None:
    """Refuse rows of token ids that the model has no embedding for.

    Raises:
        DataError: the first 10 rows are named, each with its first such token.
    """
    problems = []
    for i, ids in enumerate(rows):
        beyond = next((token_id for token_id in ids if token_id < 0 or (size is not None and token_id >= size)), None)
        if beyond is not None:
            problems.append(f"{where(i)}: {_name(beyond, tokenizer)}")
    if problems:
        raise DataError(
            f"{what} hold tokens that are not among the {size} that the model knows: {_advice(tokenizer)}\n"
            + listed(problems, "rows")
        )


def _advice(tokenizer: Any) -> str:
    return f"call `model.resize_token_embeddings({len(tokenizer)})` first, or take the tokenizer that belongs to it"


def _name(token_id: int, tokenizer: Any) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
    return f"id {token_id}" if token is None else f"{token!r} (id {token_id})"


def _rows(module: Any) -> int | None:
    """Entries of an embedding or outputs of a head, inside any wrapper; None if unknown."""
    for name in ("base_layer", "original_module"):
        module = getattr(module, name, module)
    for name in ("num_embeddings", "out_features"):
        if isinstance(size := getattr(module, name, None), int) and size > 0:
            return size
    weight: Any = getattr(module, "weight", None)
    return int(weight.shape[0]) if getattr(weight, "ndim", 0) == 2 and weight.shape[0] > 0 else None
