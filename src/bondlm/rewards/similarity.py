"""Cosine similarity of sentence embeddings as a reward: whether the completion stays on the prompt's subject.

Shapes: B rows, T tokens (padded), D embedding dimensions.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from bondlm.data.paths import refuse_absent_folder
from bondlm.errors import ConfigError
from bondlm.rewards.batching import batch_kinds, map_micro_batches, pad_right
from bondlm.rewards.pretrained import frozen, load_model, load_tokenizer
from bondlm.rewards.texts import (
    AS_TEXT,
    bad_lengths,
    broken_up,
    check_batch_bounds,
    check_choice,
    completion_text,
    prompt_text,
    token_limit,
    with_failures,
)

ADVICE = "set max_length, shorten the texts, or allow truncate='right'"

ENCODER_FILE = "sentence_bert_config.json"  # for encoders of any kind

# Names of poolings in a sentence encoder's folder; the factor of root-of-length does not change a cosine.
POOLING: dict[str, Literal["mean", "cls"]] = {
    **dict.fromkeys(("mean", "mean_tokens", "mean_sqrt_len_tokens"), "mean"),
    **dict.fromkeys(("cls", "cls_token"), "cls"),
}


class SimilarityReward:
    """Cosine, in [-1, 1], between the embeddings of the prompt and of the completion.

    The prompt is the string itself, or the last user message of a chat. Each distinct text is embedded once per call,
    so the samples of a prompt share its embedding.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        max_length: int | None = None,
        truncate: Literal["right"] | None = None,
        lower_case: bool = False,
        batch_size: int = 32,
        batch_tokens: int = 16_384,
    ) -> None:
        """Wrap an encoder that is already on its device; it is set to eval mode and frozen.

        Args:
            model: an `AutoModel` whose output has `last_hidden_state`, such as MiniLM.
            tokenizer: the encoder's own tokenizer.
            pooling: a text's embedding: the mean of its tokens' last hidden states, or that of the first token.
            max_length: maximum tokens of a text; None takes the limit stated by tokenizer and config.
            truncate: None refuses longer texts; "right" drops their end and keeps a final special token.
            lower_case: whether texts are embedded in lower case.
            batch_size: maximum texts in a forward pass.
            batch_tokens: maximum tokens in a forward pass, padding included.

        Raises:
            ConfigError: an option that is not one of those above.
        """
        check_choice("pooling", pooling, ("mean", "cls"))
        check_choice("truncate", truncate, (None, "right"))
        check_batch_bounds(batch_size, batch_tokens)
        self.model = frozen(model)
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.truncate = truncate
        self.lower_case = lower_case
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self._limit = token_limit(model, tokenizer, max_length)
        # Only a filler: padding is masked in the attention and in the mean.
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "auto",
        tokenizer: Any = None,
        **options: Any,
    ) -> Self:
        """Load a folder or hub id; `options` are those of the constructor.

        A Sentence Transformers folder determines the pooling, the case, and the maximum length unless `max_length`
        is given.

        Raises:
            ConfigError: the model cannot be loaded, lacks weights (other than those of a pooler, which is not used), or
                has a pooling or a further module that is not supported here.
        """
        from transformers import AutoModel

        refuse_absent_folder(path, "similarity model")
        pooling, stated = _stated_pooling(path), _stated(path)
        options = {"pooling": pooling, "lower_case": bool(stated.get("do_lower_case"))} | options
        model = load_model(AutoModel, path, device=device, dtype=dtype, may_miss="pooler")
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
        # MiniLM was trained on 256 tokens, but accepts 512.
        if options.get("max_length") is None and (length := stated.get("max_seq_length")) is not None:
            own = token_limit(model, tokenizer, None)
            options["max_length"] = int(length) if own is None else min(int(length), own)
        return cls(model, tokenizer, **options)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Any]:
        """Score B rows (strings, or chats); B cosines, or a `Failure` for a row that cannot be scored.

        A row cannot be scored if one of its texts has no token, or is longer than the limit while `truncate` is None.

        Raises:
            DataError: a chat without a user message.
        """
        pairs = [(prompt_text(p), completion_text(c)) for p, c in zip(prompts, completions, strict=True)]
        texts = list(dict.fromkeys([p for p, _ in pairs] + [c for _, c in pairs]))
        encoded = [self._encode(text) for text in texts]
        problem = {texts[i]: failure for i, failure in bad_lengths(encoded, self._limit, ADVICE).items()}
        failed = {row: problem[text] for row, pair in enumerate(pairs) for text in reversed(pair) if text in problem}
        place = {text: i for i, text in enumerate(text for text in texts if text not in problem)}
        scored = [pair for row, pair in enumerate(pairs) if row not in failed]
        if not scored:
            return with_failures([], failed, len(pairs))
        embeddings = self._embed([ids for text, ids in zip(texts, encoded, strict=True) if text in place])
        prompts_BD, completions_BD = (embeddings[[place[pair[i]] for pair in scored]] for i in (0, 1))
        return with_failures(cosine_similarity(prompts_BD, completions_BD, dim=-1).tolist(), failed, len(pairs))

    @property
    def limit(self) -> int | None:
        """Maximum tokens of a text; None if there is no limit, or if longer texts are cut."""
        return self._limit if self.truncate is None else None

    def num_tokens(self, row: Mapping[str, Any], completion_tokens: int) -> int:
        """Tokens of the longer of prompt and completion, since each is embedded separately."""
        return max(len(self._encode(prompt_text(row["prompt"]))), completion_tokens)

    def _embed(self, rows_B: list[list[int]]) -> Tensor:
        """The mean of each text's last hidden states, or the first of them: (B, D), float64 on the CPU."""
        return map_micro_batches(
            [len(row) for row in rows_B],
            lambda rows: self._forward({"input_ids": rows_B}, rows),
            max_rows=self.batch_size,
            max_tokens=self.batch_tokens,
            kinds=batch_kinds(self.model, rows_B),
        )

    def _encode(self, text: str) -> list[int]:
        text = text.lower() if self.lower_case else text
        ids: list[int] = self.tokenizer(broken_up(text, self.tokenizer), **AS_TEXT)["input_ids"]
        if self.truncate == "right" and self._limit is not None and len(ids) > self._limit:
            tail = ids[-1:] if ids[-1] in self.tokenizer.all_special_ids else []
            ids = [*ids[: self._limit - len(tail)], *tail]
        return ids

    @torch.no_grad()
    def _forward(self, encoded: dict[str, list[list[int]]], rows: list[int]) -> Tensor:
        inputs = pad_right(encoded, rows, self._pad_id, self.model.device)
        hidden_BTD: Tensor = self.model(**inputs).last_hidden_state.float()
        if self.pooling == "cls":
            return hidden_BTD[:, 0].cpu().double()
        mask_BT1 = inputs["attention_mask"][:, :, None].float()
        return ((hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)).cpu().double()


def _stated_pooling(path: str) -> Literal["mean", "cls"]:
    """The pooling of a Sentence Transformers folder; the mean for other folders.

    Raises:
        ConfigError: its pooling is not supported by this reward, or its files cannot be read.
    """
    modules = _json_of(path, "modules.json")
    if modules is None:
        return "mean"
    listed = modules if isinstance(modules, list) and all(isinstance(module, dict) for module in modules) else []
    kinds = [str(module.get("type")).rpartition(".")[2] for module in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"}:  # a cosine normalises in any case
        raise ConfigError(
            f"similarity model {path!r} consists of {', '.join(kinds) or 'nothing known'} (modules.json), but this "
            "reward supports only Transformer, Pooling and Normalize: use another encoder, or write a reward function "
            "with sentence-transformers"
        )
    file = f"{modules[1].get('path') or '1_Pooling'}/config.json"
    stated = _facts_of(path, file)
    names = [key.removeprefix("pooling_mode_") for key, value in stated.items() if value is True and "_mode_" in key]
    mode = stated.get("pooling_mode", [])
    names += map(str, mode) if isinstance(mode, list) else [str(mode)]
    if len(names) != 1 or names[0] not in POOLING:
        raise ConfigError(
            f"similarity model {path!r} pools by {', '.join(names) or 'nothing'} ({file}), "
            "but this reward supports only mean and cls: use another encoder, or write a reward function with "
            "sentence-transformers"
        )
    settings = _facts_of(path, "config_sentence_transformers.json")
    name = settings.get("default_prompt_name")
    if (settings.get("prompts") or {}).get(name):
        raise ConfigError(
            f"similarity model {path!r} puts the prompt {name!r} before each text (config_sentence_transformers.json), "
            "and this reward does not: write a reward function with sentence-transformers"
        )
    return POOLING[names[0]]


def _stated(path: str) -> dict[str, Any]:
    """How the encoder of a Sentence Transformers folder is fed; empty for other folders."""
    modules = _json_of(path, "modules.json")
    if not modules:
        return {}
    within = str(modules[0].get("path") or "")
    return _facts_of(path, f"{within}/{ENCODER_FILE}" if within else ENCODER_FILE)


def _facts_of(path: str, name: str) -> dict[str, Any]:
    """The facts in a JSON file of a model; none if there is no file of this name."""
    found = _json_of(path, name) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"similarity model {path!r}: {name} holds a {type(found).__name__}, not names and values")
    return found


def _json_of(path: str, name: str) -> Any:
    """A JSON file of a model; None if there is no file of this name."""
    from transformers.utils import cached_file

    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"similarity model {path!r}: its {name} cannot be read: {error}") from error
