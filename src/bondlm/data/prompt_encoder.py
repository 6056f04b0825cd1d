"""Between text and token ids for one model: its tokenizer, its end-of-sequence ids, its limits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from bondlm.data.columns import PROMPT_IDS, PROMPT_ROW
from bondlm.data.context import start_id
from bondlm.data.prompts import load_prompts
from bondlm.data.tokens import Prompt, check_tokenizer, decode_completions, encode_prompts, length_limits


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Encodes prompts as a model expects them, and decodes its completions as rewards see them."""

    tokenizer: Any
    config: Any  # of the model
    eos_ids: tuple[int, ...]  # they end a completion; never empty
    pad_id: int  # fills the unused cells of a batch; may be one of `eos_ids`, so no mask is ever made from it
    start_id: int | None  # the decoder's first token; None for a decoder-only model
    max_prompt_length: int | None = None
    max_completion_length: int = 256
    truncate_prompt: str = "never"

    @classmethod
    def of_model(cls, model: Any, tokenizer: Any, **limits: Any) -> "PromptEncoder":
        """For a transformers model without adapters around it; `limits` are the last three fields.

        Raises:
            ConfigError: no end-of-sequence token, or one that is no token id.
        """
        text = check_tokenizer(tokenizer, model.generation_config.eos_token_id)
        ids: dict[str, Any] = {"eos_ids": text.eos_ids, "pad_id": text.pad_id, "start_id": start_id(model)}
        return cls(tokenizer=tokenizer, config=model.config, **ids, **limits)

    def limited_to(self, **limits: Any) -> "PromptEncoder":
        """The same with other limits."""
        return replace(self, **limits)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt.

        Raises:
            ConfigError, DataError: see `encode_prompts`.
        """
        limits = length_limits(self.config, self.max_prompt_length, self.max_completion_length, self.truncate_prompt)
        return encode_prompts(prompts, self.tokenizer, **limits)

    def encoded(self, source: Any) -> Dataset:
        """Prompts from a data set, rows or a file, with their ids and their numbers as columns."""
        prompts = load_prompts(source)
        ids = self.encode(prompts["prompt"][:])
        return prompts.add_column(PROMPT_IDS, ids).add_column(PROMPT_ROW, list(range(len(ids))))

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole answers, each with the end-of-sequence token that the model is to learn."""
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[*ids, self.eos_ids[0]] for ids in rows]

    def decode(self, completions: Sequence[Sequence[Sequence[int]]]) -> list[list[str]]:
        """Completions of each prompt, as ids, to the text that rewards see."""
        return [decode_completions(ids, self.tokenizer, self.eos_ids) for ids in completions]
