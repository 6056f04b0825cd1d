"""A reward model with one output: Hugging Face sequence classification.

Shapes: B rows, T tokens (padded).
"""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from bondlm.data.chat_templates import render_chat
from bondlm.data.rendering import TEMPLATE_ERRORS, as_chat
from bondlm.errors import ConfigError, DataError
from bondlm.rewards.answers import Failure
from bondlm.rewards.batching import batch_kinds, head_pad_id, map_micro_batches, pad_right
from bondlm.rewards.pretrained import frozen, load_config, load_model, load_tokenizer
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

FACTS_FILE = "reward.json"  # in the folder of a reward model that bondlm has trained
# The chat template for a base model without one that becomes a reward model, so that it can score conversations.
FALLBACK_TEMPLATES = {
    "encoder": "{{ cls_token }}{% for message in messages %}{{ message['content'] }}{{ sep_token }}{% endfor %}",
    "decoder": (
        "{{ bos_token if bos_token else '' }}{% for message in messages %}{{ message['role'] + ': ' + "
        "message['content'] + '\n' }}{% endfor %}{{ eos_token }}"
    ),
}
_logger = logging.getLogger(__name__)


class SequenceClassifierReward:
    """Score prompt and completion with a sequence classifier that has one label.

    The text is always built with the *reward* model's tokenizer. Chats are rendered with its chat template. If it has
    one, a plain prompt and its completion are also rendered with it, as a user message and an answer; otherwise plain
    texts are prompt + completion, or a pair (`prompt_format`). Rows are scored in micro-batches of similar length,
    padded on the right; of equal length, if the model does not mask padding everywhere (MobileBERT). A row's score does
    not depend on its neighbours except for rounding: in bf16, by about 0.02 of its value, or 0.02 for values below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        append_eos: Literal["auto"] | bool = "auto",
        prompt_format: Literal["auto", "chat", "plain", "pair"] = "auto",
        max_length: int | None = None,
        truncate: Literal["left"] | None = None,
        batch_size: int = 16,
        batch_tokens: int = 16_384,
    ) -> None:
        """Wrap a model that is already on its device: in eval mode, frozen, its last layer in fp32.

        Args:
            model: an `AutoModelForSequenceClassification` with `num_labels == 1`.
            tokenizer: the reward model's own tokenizer.
            append_eos: end each plain or rendered text with the end-of-sequence token. "auto" does so when the
                tokenizer has no chat template; a text that already ends with the token never gets a second one.
            prompt_format: how the model gets plain text: "chat" turns it into messages, "plain" joins prompt and
                completion, and "auto" means "chat" if the tokenizer has a chat template other than bondlm's own. "pair"
                gives prompt (of a chat, the last user message) and completion as the two texts of a cross-encoder.
            max_length: maximum tokens of a row; None takes the limit stated by tokenizer and config.
            truncate: None refuses longer rows; "left" drops their oldest tokens and keeps a leading special token.
            batch_size: maximum rows in a forward pass.
            batch_tokens: maximum tokens in a forward pass, padding included.

        Raises:
            ConfigError: more than one label, or an option that is not one of those above.
        """
        check_choice("append_eos", append_eos, ("auto", True, False))
        check_choice("truncate", truncate, (None, "left"))
        check_choice("prompt_format", prompt_format, ("auto", "chat", "plain", "pair"))
        check_batch_bounds(batch_size, batch_tokens)
        if append_eos is True and tokenizer.eos_token_id is None:
            raise ConfigError(
                "append_eos is True and the reward model's tokenizer has no eos_token: set append_eos=False."
            )
        if prompt_format == "pair" and (truncate is not None or append_eos is True):
            raise ConfigError("prompt_format='pair' takes no truncate and no append_eos: remove them.")
        self.model = frozen(model)
        _check_one_label(self.model.config, type(model).__name__)
        if prompt_format == "auto" and tokenizer.chat_template is None and tokenizer.sep_token is not None:
            _logger.warning(
                "the reward model %s has no chat template, and gets prompt and completion as one text without a "
                "separator. Encoders are mostly trained on pairs: set prompt_format=pair, or plain if this is right",
                self.model.config.name_or_path or type(model).__name__,
            )
        self.tokenizer = tokenizer
        self.truncate = truncate
        self.prompt_format = _format_of_text(tokenizer) if prompt_format == "auto" else prompt_format
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self._limit = token_limit(model, tokenizer, max_length)
        self._pad_id = head_pad_id(model, tokenizer)
        wants_eos = tokenizer.chat_template is None if append_eos == "auto" else append_eos
        self._eos_id: int | None = tokenizer.eos_token_id if wants_eos else None
        # A KV cache is useless in a single forward pass; only decoder-type models have the argument.
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self._is_logged = False

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

        Raises:
            ConfigError: the model cannot be loaded, does not have exactly one label, or its head is not in the
                checkpoint.
        """
        from transformers import AutoModelForSequenceClassification

        _check_one_label(load_config(path), path)
        options = {"prompt_format": trained_format(path)} | options
        model = load_model(AutoModelForSequenceClassification, path, device=device, dtype=dtype)
        return cls(model, load_tokenizer(path) if tokenizer is None else tokenizer, **options)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Any]:
        """Score B rows (strings, or chats); B numbers, or a `Failure` for a row that cannot be scored.

        A row cannot be scored if it has no token, is longer than the limit while `truncate` is None, or is a
        conversation that the chat template refuses.

        Raises:
            ConfigError: the rows are chats, and the reward model's tokenizer has no chat template.
        """
        failed: dict[int, Failure] = {}
        rows_B: list[dict[str, list[int]]] = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                rows_B.append(self._encoded(prompt, completion))
            except DataError as error:
                rows_B.append({"input_ids": []})
                failed[row] = Failure(f"cannot score a conversation: {error},")
        advice = "set max_length, shorten the texts, or allow truncate='left'"
        failed = bad_lengths([row["input_ids"] for row in rows_B], self._limit, advice) | failed
        good = [encoded for row, encoded in enumerate(rows_B) if row not in failed]
        if not good:
            return with_failures([], failed, len(rows_B))
        self._log_ending(good[0]["input_ids"])
        encoded = {key: [row[key] for row in good] for key in good[0]}
        scores = map_micro_batches(
            [len(ids) for ids in encoded["input_ids"]],
            lambda rows: self._forward(encoded, rows),
            max_rows=self.batch_size if self._pad_id is not None else 1,
            max_tokens=self.batch_tokens,
            kinds=batch_kinds(self.model, encoded["input_ids"]),
        )
        return with_failures(scores.tolist(), failed, len(rows_B))

    @property
    def limit(self) -> int | None:
        """Maximum tokens of a row; None if there is no limit, or if longer rows are cut."""
        return self._limit if self.truncate is None else None

    def num_tokens(self, row: Mapping[str, Any], completion_tokens: int) -> int:
        """Tokens of a row of the data set with a completion of `completion_tokens`.

        Raises:
            ConfigError: a chat, and the tokenizer has no chat template.
            DataError: the chat template refuses the prompt.
        """
        prompt = row["prompt"]
        empty = "" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}]
        return len(self.encode(prompt, empty)) + completion_tokens

    def encode(self, prompt: Any, completion: Any) -> list[int]:
        """Token ids of a row as the model sees it.

        Raises:
            ConfigError: a chat, and the tokenizer has no chat template.
            DataError: the chat template refuses the conversation.
        """
        return self._encoded(prompt, completion)["input_ids"]

    def _encoded(self, prompt: Any, completion: Any) -> dict[str, list[int]]:
        if self.prompt_format == "pair":
            texts = (broken_up(text, self.tokenizer) for text in (prompt_text(prompt), completion_text(completion)))
            pair = self.tokenizer(*texts, **AS_TEXT)
            return {key: pair[key] for key in ("input_ids", "token_type_ids") if key in pair}
        text, is_rendered = self.render(prompt, completion)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not is_rendered, verbose=False)["input_ids"]
        if self._eos_id is not None and ids[-1:] != [self._eos_id]:
            ids = [*ids, self._eos_id]
        if self.truncate == "left" and self._limit is not None and len(ids) > self._limit:
            head = ids[:1] if ids[0] in self.tokenizer.all_special_ids else []
            ids = [*head, *ids[len(ids) - self._limit + len(head) :]]
        return {"input_ids": ids}

    def render(self, prompt: Any, completion: Any) -> tuple[str, bool]:
        """The text to score, and whether the chat template wrote it (then it already holds its special tokens).

        Raises:
            ConfigError: a chat, and the tokenizer has no chat template.
            DataError: the chat template refuses the conversation.
        """
        from jinja2 import TemplateError

        if isinstance(prompt, str) and self.prompt_format == "plain":
            return prompt + completion, False
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                "the prompts are conversations and the reward model's tokenizer has no chat_template: set one on it "
                "(reward_processing_classes), give the last user message and the answer as a pair "
                "(prompt_format=pair), or wrap the model in a function that builds the text."
            )
        chat = as_chat(prompt)
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        if chat[-1]["role"] == "assistant":  # the completion continues it
            answer[0] = {**answer[0], "content": chat.pop()["content"] + answer[0]["content"]}
        try:
            return render_chat([*chat, *answer], self.tokenizer, place="an answer that a reward model scores"), True
        except ConfigError:  # also a ValueError
            raise
        except (*TEMPLATE_ERRORS, TemplateError) as error:
            raise DataError(
                f"the reward model's chat template refuses it ({type(error).__name__}: {error}; change the messages, "
                "or set another template on the tokenizer in reward_processing_classes)"
            ) from error

    @torch.no_grad()
    def _forward(self, encoded: dict[str, list[list[int]]], rows: list[int]) -> Tensor:
        inputs = pad_right(encoded, rows, self._pad_id or 0, self.model.device)
        logits: Tensor = self.model(**inputs, **self._options).logits
        return logits[:, 0].cpu().double()  # CPU first: some devices have no float64

    def _log_ending(self, ids: list[int]) -> None:
        """Log once which tokens end a scored row, so that a missing or doubled end-of-sequence token is easy to see."""
        if not self._is_logged:
            self._is_logged = True
            tokens = self.tokenizer.convert_ids_to_tokens(ids[-5:])
            _logger.info("the reward model scores rows that end with the tokens %s", tokens)


def _format_of_text(tokenizer: Any) -> Literal["chat", "plain"]:
    return "plain" if tokenizer.chat_template in (None, *FALLBACK_TEMPLATES.values()) else "chat"


def trained_format(path: str) -> Literal["auto", "chat", "plain"]:
    """The `prompt_format` that `bondlm reward-model` trained a reward model with, if its folder states it.

    Raises:
        ConfigError: the file that states it is damaged.
    """
    facts = Path(path) / FACTS_FILE
    if not facts.is_file():
        return "auto"
    try:
        found = json.loads(facts.read_text(encoding="utf-8"))["prompt_format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{facts} of the reward model cannot be read: {error}. Restore it, or remove it.") from error
    return "chat" if found == "chat" else "plain"


def _check_one_label(config: Any, name: str) -> None:
    if config.num_labels != 1:
        raise ConfigError(
            f"reward model {name!r} ({', '.join(config.architectures or ['?'])}) has {config.num_labels} labels "
            f"{list(config.id2label.values())}: a reward has one. For an entailment (NLI) model write 'nli:{name}'; "
            "train a language model as a reward model with num_labels=1 first; for one class of several write a "
            "function."
        )
