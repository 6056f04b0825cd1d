"""Conversion between text and token ids for one model: its tokenizer, its end-of-sequence ids, its limits."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from datasets import Dataset

from bondlm.data.columns import PROMPT_IDS, PROMPT_ROW, TEMPLATE_VARIABLES, TOOLS
from bondlm.data.context import start_id
from bondlm.data.control import control_ids, plain_ids
from bondlm.data.prompts import load_prompts
from bondlm.data.rendering import Rendering, has_template, template_source, turn_end
from bondlm.data.table import with_prompts
from bondlm.data.tokens import Prompt, check_tokenizer, decode_completions, encode_prompts, length_limits
from bondlm.data.vocabulary import Sizes, check_ids, check_vocabulary
from bondlm.errors import ConfigError, DataError, listed

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Encodes prompts for a model, and decodes its completions for rewards."""

    tokenizer: Any
    config: Any  # the model's config
    eos_ids: tuple[int, ...]  # ids that end a completion; never empty
    pad_id: int  # fills the unused cells of a batch; may be one of `eos_ids`, so masks are never made from it
    start_id: int | None  # the decoder's first token; None for a decoder-only model
    sizes: Sizes = field(default_factory=Sizes)
    rendering: Rendering = field(default_factory=Rendering)
    max_prompt_length: int | None = None
    max_completion_length: int = 256
    truncate_prompt: str = "never"
    _said: set[str] = field(default_factory=set, repr=False, compare=False)  # each message once, for any limits

    @classmethod
    def of_model(cls, model: Any, tokenizer: Any, **more: Any) -> "PromptEncoder":
        """The encoder for a transformers model without an adapter wrapper; `more` are the rendering and the limits.

        Raises:
            ConfigError: there is no end-of-sequence token, or tokenizer, embedding and head do not fit together.
        """
        text = check_tokenizer(tokenizer, model.generation_config.eos_token_id)
        sizes = check_vocabulary(model, tokenizer, text.eos_ids)
        known = [size for size in (sizes.prompt, sizes.completion) if size is not None]
        pad_id = text.pad_id if all(text.pad_id < size for size in known) else text.eos_ids[0]  # it is never read
        ids: dict[str, Any] = {"eos_ids": text.eos_ids, "pad_id": pad_id, "start_id": start_id(model)}
        return cls(tokenizer=tokenizer, config=model.config, sizes=sizes, **ids, **more)

    def limited_to(self, **limits: Any) -> "PromptEncoder":
        """The same encoder with other limits."""
        return replace(self, **limits)

    def encode(
        self,
        prompts: Sequence[Prompt],
        columns: Sequence[Mapping[str, Any]] | None = None,
        skipped: dict[int, str] | None = None,
        where: Callable[[int], str] = "row {}".format,
    ) -> list[list[int]]:
        """Token ids of each prompt; `columns` are those of their rows that the template uses.

        `skipped` takes the reason for each unusable row, and `where` gives the name of a row in messages.

        Raises:
            ConfigError, DataError: see `encode_prompts`; or the model does not know a token.
        """
        if prompts:
            self._say_how(prompts[0])
        limits = length_limits(self.config, self.max_prompt_length, self.max_completion_length, self.truncate_prompt)
        how: dict[str, Any] = {"rendering": self.rendering, "columns": columns, "skipped": skipped, "where": where}
        ids = encode_prompts(prompts, self.tokenizer, **limits, **how)
        check_ids(ids, self.sizes.prompt, self.tokenizer, "prompts", where)
        return ids

    def encoded(self, source: Any, skipped: list[str] | None = None, *, held_out: bool = False) -> Dataset:
        """Prompts from a data set, rows or a file, with their ids and their numbers as columns.

        Unusable rows are left out if `skipped` is given to take their reasons. Prompts given as token ids become text.
        `held_out` prompts come from the split that is not for training.
        """
        places: list[str] = []
        takes_ids = self.rendering.prompt_format == "rendered"
        prompts = load_prompts(source, held_out=held_out, token_ids=takes_ids, places=places)
        return self.with_ids(prompts, skipped, places.__getitem__)

    def with_ids(
        self, prompts: Dataset, skipped: list[str] | None = None, where: Callable[[int], str] = "row {}".format
    ) -> Dataset:
        """The same for loaded prompts; `where` gives the name of a row in messages, by its number."""
        bad: dict[int, str] | None = None if skipped is None else {}
        names = [name for name in (TOOLS, TEMPLATE_VARIABLES) if name in prompts.column_names]
        columns = list(prompts.select_columns(names)) if names else None
        ids = self.encode(prompts["prompt"][:], columns, bad, where)
        if bad and skipped is not None:
            skipped += [f"{where(row)}: {reason}" for row, reason in sorted(bad.items())]
            good = [row for row in range(len(ids)) if row not in bad]
            if not good:
                raise DataError(f"no row can be used:\n{listed(skipped, 'rows')}")
            prompts, ids = prompts.select(good), [ids[row] for row in good]
        if len(ids) and not isinstance(prompts["prompt"][0], str) and self._kind(prompts["prompt"][0]) == "ids":
            prompts = with_prompts(prompts, self.tokenizer.batch_decode(ids))
        return prompts.add_column(PROMPT_IDS, ids).add_column(PROMPT_ROW, list(range(len(ids))))

    def encode_answers(
        self, texts: Sequence[str], prompts: Sequence[Prompt], where: Callable[[int], str] = "row {}".format
    ) -> list[list[int]]:
        """Token ids of whole answers with their end token; in a conversation, that is the one the template writes.

        An end token that a text ends with already is not added again. `where` gives the name of a row in messages.

        Raises:
            DataError: the model cannot write a token, or would stop before the end of an answer.
        """
        rows = plain_ids(texts, self.tokenizer, add_special_tokens=False) if texts else []
        ends = [self.end_id(prompt) for prompt in prompts]
        rows = self._without_ends(rows, {*self.eos_ids, *ends} & self._control, where)
        answers = [[*ids, end] for ids, end in zip(rows, ends, strict=True)]
        check_ids(answers, self.sizes.head, self.tokenizer, "answers", where)
        return answers

    def _without_ends(self, rows: Sequence[list[int]], ends: set[int], where: Callable[[int], str]) -> list[list[int]]:
        """The ids before the first end token, after which there may only be space or more end tokens."""
        kept, problems = [], []
        for i, ids in enumerate(rows):
            at = next((place for place, token_id in enumerate(ids) if token_id in ends), len(ids))
            kept.append(ids[:at])
            if self.tokenizer.decode([token_id for token_id in ids[at:] if token_id not in ends]).strip():
                problems.append(f"{where(i)}: {self.tokenizer.convert_ids_to_tokens(ids[at])!r} inside its answer")
            elif at < len(ids):
                self._say("the text of answers ends with an end-of-sequence token: a second one is not added")
        if problems:
            raise DataError(
                "answers hold tokens at which the model stops before they end. Remove these from the text, or the "
                f"rows:\n{listed(problems, 'rows')}"
            )
        return kept

    def end_id(self, prompt: Prompt) -> int:
        """The token that ends an answer to this prompt, for learning answers that the model did not sample."""
        if self._kind(prompt) == "plain" or not has_template(self.tokenizer):
            return self.eos_ids[0]
        return self.eos_ids[0] if self._turn_end is None else self._turn_end

    def decode(self, completions: Sequence[Sequence[Sequence[int]]]) -> list[list[str]]:
        """The text that rewards get, from the ids of each prompt's completions."""
        return [decode_completions(ids, self.tokenizer, self.eos_ids) for ids in completions]

    def _kind(self, prompt: Prompt) -> str:
        return self.rendering.kind_of(prompt, self.tokenizer)

    @cached_property
    def _control(self) -> set[int]:
        """Control tokens; a model may also stop at an ordinary one, such as a line's end."""
        return set(control_ids(self.tokenizer, ""))

    @cached_property
    def _turn_end(self) -> int | None:
        try:
            control = control_ids(self.tokenizer, template_source(self.tokenizer))
        except ConfigError:  # several templates, and none for a plain conversation
            return None
        return turn_end(self.tokenizer, control, self.eos_ids, self.rendering)

    def _say_how(self, prompt: Prompt) -> None:
        """Log once how text is treated, and whether a turn ends with a token that is not the model's end."""
        kind = self._kind(prompt)
        if isinstance(prompt, str) and self.rendering.prompt_format == "auto" and has_template(self.tokenizer):
            self._say(
                "each plain prompt is given to this chat model as one user message (prompt_format='auto'; "
                "'plain' passes it unchanged)"
            )
        if isinstance(prompt, list | tuple) and kind == "chat" and prompt[-1]["role"] == "assistant":
            self._say("prompts that end with an assistant's message are continued where it ends")
        if kind == "plain" or not has_template(self.tokenizer):
            return
        end = self._turn_end
        if end is not None and end not in self.eos_ids:
            written, *ends = (f"{self.tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in (end, *self.eos_ids))
            self._say(
                f"the chat template ends a turn with {written}, which is not an end-of-sequence token of this model: "
                f"completions end with {', '.join(ends)} only, and run past it. If the model ends its turns that way, "
                f"add {end} to eos_token_id in the generation config"
            )

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning("%s", text)
