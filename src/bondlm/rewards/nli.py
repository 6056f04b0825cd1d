"""Entailment as a reward: how sure a model is that the completion (hypothesis) follows from the premise.

Shapes: B rows, V vocabulary, K labels.
"""

import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

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
    column_text,
    completion_text,
    prompt_text,
    token_limit,
    with_failures,
)

TEMPLATES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "true": ("premise: {premise} hypothesis: {hypothesis}", ("1",), ("0",)),
    "flan": (
        "Premise: {premise} Hypothesis: {hypothesis} Does the premise entail the hypothesis? yes or no",
        ("yes",),
        ("no", "it"),  # "it is not possible to tell"
    ),
}
"""Name -> (text, positive answer, negative answers). "true" is the form of the TRUE models (T5 trained on NLI)."""


class NLIReward:
    """Reward a completion for being entailed by its premise, using a cross-encoder or a T5 that answers in words.

    With "margin" the reward is the log-odds of entailment: for a cross-encoder `z_entail - logsumexp(z_others)` over
    its K labels, for a T5 `z_positive - logsumexp(z_negatives)` over the answers' first tokens at the first decoder
    step. "log_prob" is `logsigmoid(margin)`, the log-probability among the labels or answers. Each is an increasing
    function of the other; the margin keeps its resolution where the probability is near 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        template: str | None = None,
        positive: str | None = None,
        negative: Sequence[str] | None = None,
        entailment_label: str | None = None,
        premise_column: str | None = None,
        premise_prefix: str = "",
        output: Literal["margin", "log_prob"] = "margin",
        max_length: int | None = None,
        truncate: Literal["premise"] | None = None,
        batch_size: int = 16,
        batch_tokens: int = 16_384,
    ) -> None:
        """Wrap a model that is already on its device: in eval mode, frozen, its last layer in fp32.

        Args:
            model: sequence classifier with an entailment label, or encoder-decoder language model.
            tokenizer: the model's own tokenizer.
            template: encoder-decoder only: "true" (default), "flan", or a text with {premise} and {hypothesis}.
            positive: encoder-decoder only: the answer that means entailed; None takes the template's ("1").
            negative: encoder-decoder only: the answers that mean not entailed; None takes the template's ("0").
            entailment_label: cross-encoder only: its label; None takes the one that starts with "entail".
            premise_column: dataset column with the premises; None takes the prompt (of a chat: the last user message).
            premise_prefix: removed from the start of a premise, such as "summarize: ".
            output: "margin" or "log_prob".
            max_length: maximum tokens of a row; None takes the limit stated by tokenizer and config.
            truncate: None refuses longer rows; "premise" drops the end of their premise.
            batch_size: maximum rows in a forward pass.
            batch_tokens: maximum tokens in a forward pass, padding included.

        Raises:
            ConfigError: labels or answers that cannot be told apart, or an option that does not fit the model.
        """
        check_choice("output", output, ("margin", "log_prob"))
        check_choice("truncate", truncate, (None, "premise"))
        check_batch_bounds(batch_size, batch_tokens)
        self.model = frozen(model)
        self.tokenizer = tokenizer
        self.premise_column = premise_column
        self.premise_prefix = premise_prefix
        self.output = output
        self.truncate = truncate
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self._limit = token_limit(model, tokenizer, max_length)
        self._template: str | None = None
        config: Any = model.config
        if config.is_encoder_decoder and self.model.can_generate():
            _refuse_options("an encoder-decoder language model", entailment_label=entailment_label)
            self._template, self._positive_id, self._negative_ids = _answers(tokenizer, template, positive, negative)
            self._start_id = _decoder_start(self.model)
            self._pad_id = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
        else:
            _refuse_options("a cross-encoder", template=template, positive=positive, negative=negative)
            self._positive_id = _entailment_id(config, entailment_label)
            self._negative_ids = [label for label in range(config.num_labels) if label != self._positive_id]
            self._pad_id = head_pad_id(model, tokenizer)

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
            ConfigError: the model cannot be loaded, lacks weights, or does not fit the options.
        """
        from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

        config = load_config(path)
        is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
        if config.is_encoder_decoder and not is_classifier:
            model = load_model(AutoModelForSeq2SeqLM, path, device=device, dtype=dtype)
        else:
            _entailment_id(config, options.get("entailment_label"))  # checked before gigabytes are read
            model = load_model(AutoModelForSequenceClassification, path, device=device, dtype=dtype)
        return cls(model, load_tokenizer(path) if tokenizer is None else tokenizer, **options)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[Any]:
        """Score B rows (strings, or chats); B numbers, or a `Failure` for a row that cannot be scored.

        A row cannot be scored if it is longer than the limit and may not be shortened, or has no text in
        `premise_column`.

        Raises:
            ConfigError: `premise_column` is not among the columns.
            DataError: a chat without a user message.
        """
        hypotheses = [completion_text(completion) for completion in completions]
        premises = self._premises(prompts, columns)
        failed = {row: premise for row, premise in enumerate(premises) if isinstance(premise, Failure)}
        rows_B: list[dict[str, list[int]]] = [
            {"input_ids": []} if isinstance(premise, Failure) else self._encode_row(premise, hypothesis)
            for premise, hypothesis in zip(premises, hypotheses, strict=True)
        ]
        advice = "set max_length, shorten the texts, or allow truncate='premise'"
        failed = bad_lengths([row["input_ids"] for row in rows_B], self._limit, advice) | failed
        good = [encoded for row, encoded in enumerate(rows_B) if row not in failed]
        if not good:
            return with_failures([], failed, len(rows_B))
        encoded = {key: [row[key] for row in good] for key in good[0]}
        margins = map_micro_batches(
            [len(row) for row in encoded["input_ids"]],
            lambda rows: self._margins(encoded, rows),
            max_rows=self.batch_size if self._pad_id is not None else 1,
            max_tokens=self.batch_tokens,
            kinds=batch_kinds(self.model, encoded["input_ids"]),
        )
        rewards = margins if self.output == "margin" else logsigmoid(margins)
        return with_failures(rewards.tolist(), failed, len(rows_B))

    @property
    def limit(self) -> int | None:
        """Maximum tokens of a row; None if there is no limit, or if longer rows are cut."""
        return self._limit if self.truncate is None else None

    def num_tokens(self, row: Mapping[str, Any], completion_tokens: int) -> int:
        """Tokens of a row of the data set with a completion of `completion_tokens`.

        Raises:
            ConfigError: `premise_column` is not among the columns.
            DataError: a chat without a user message, or no text in `premise_column`.
        """
        (premise,) = self._premises([row["prompt"]], {name: [value] for name, value in row.items()})
        if isinstance(premise, Failure):
            raise DataError(f"it {premise.reason}")
        mark = "."  # without a hypothesis there would be no separator after it
        other = len(self.tokenizer(mark, add_special_tokens=False, verbose=False)["input_ids"])
        return len(self._tokenize(premise, mark)["input_ids"]) - other + completion_tokens

    def _premises(self, prompts: Sequence[Any], columns: dict[str, Sequence[Any]]) -> list[str | Failure]:
        texts: list[str | Failure]
        if self.premise_column is None:
            texts = [prompt_text(prompt) for prompt in prompts]
        elif self.premise_column in columns:
            texts = [column_text(self.premise_column, value) for value in columns[self.premise_column]]
        else:
            raise ConfigError(
                f"premise_column is {self.premise_column!r} and the dataset's columns are "
                f"{', '.join(columns) or 'none'}: name one of them."
            )
        return [text if isinstance(text, Failure) else text.removeprefix(self.premise_prefix) for text in texts]

    def _encode_row(self, premise: str, hypothesis: str) -> dict[str, list[int]]:
        premise, hypothesis = (broken_up(text, self.tokenizer) for text in (premise, hypothesis))
        encoded = self._tokenize(premise, hypothesis)
        while self.truncate is not None and self._limit is not None and premise:
            excess = len(encoded["input_ids"]) - self._limit
            if excess <= 0:
                break
            ids = self.tokenizer(premise, add_special_tokens=False, **AS_TEXT)["input_ids"]
            shorter = self.tokenizer.decode(ids[: max(len(ids) - excess, 0)])
            # Cut text may split into more tokens than before; each round must still make it shorter.
            premise = shorter if len(shorter) < len(premise) else premise[: len(premise) // 2]
            encoded = self._tokenize(premise, hypothesis)
        return encoded

    def _tokenize(self, premise: str, hypothesis: str) -> dict[str, list[int]]:
        if self._template is None:
            encoded = self.tokenizer(premise, hypothesis, **AS_TEXT)
        else:
            encoded = self.tokenizer(self._template.format(premise=premise, hypothesis=hypothesis), verbose=False)
        return {key: encoded[key] for key in ("input_ids", "token_type_ids") if key in encoded}

    @torch.no_grad()
    def _margins(self, encoded: dict[str, list[list[int]]], rows: list[int]) -> Tensor:
        inputs = pad_right(encoded, rows, self._pad_id or 0, self.model.device)
        if self._template is None:
            logits: Tensor = self.model(**inputs).logits  # (b, K)
        else:
            start = torch.full((len(rows), 1), self._start_id, device=self.model.device)
            inputs.pop("token_type_ids", None)
            logits = self.model(**inputs, decoder_input_ids=start, use_cache=False).logits[:, 0]  # (b, V)
        choices = logits[:, [self._positive_id, *self._negative_ids]].cpu().double()  # CPU first: not all have float64
        return choices[:, 0] - choices[:, 1:].logsumexp(dim=-1)


def _refuse_options(kind: str, **options: Any) -> None:
    """Refuse options that this kind of model would ignore."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"the NLI model is {kind}, which does not use {', '.join(given)}: remove it.")


def _entailment_id(config: Any, entailment_label: str | None) -> int:
    """Index of the entailment label; ConfigError that lists the labels unless there is exactly one."""
    labels = [str(label) for _, label in sorted(config.id2label.items())]  # label2id may be missing, or another
    if entailment_label is not None:
        found = [label for label in labels if label.lower() == entailment_label.lower()]
    else:
        found = [label for label in labels if label.lower().startswith("entail")]
    if len(found) != 1 or len(labels) < 2:
        wanted = repr(entailment_label) if entailment_label is not None else "'entail...'"
        raise ConfigError(
            f"the NLI model's labels are {labels}, but one label {wanted} and at least one other are needed: "
            "name it with entailment_label."
        )
    return labels.index(found[0])


def _answers(
    tokenizer: Any, template: str | None, positive: str | None, negative: Sequence[str] | None
) -> tuple[str, int, list[int]]:
    """Template text and the first token ids of the answers."""
    name = template if template is not None else "true"
    text, default_positive, default_negative = TEMPLATES.get(name, (name, ("1",), ("0",)))
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError:  # an unmatched brace
        fields = set()
    if fields != {"premise", "hypothesis"}:
        raise ConfigError(
            f"the NLI template {name!r} is not one of {', '.join(TEMPLATES)} and not a text with {{premise}} and "
            "{hypothesis} and no other braces."
        )
    positive_words = default_positive if positive is None else (positive,)
    negative_words = default_negative if negative is None else tuple(negative)
    positive_id = _first_token(tokenizer, positive_words[0])
    negative_ids = [_first_token(tokenizer, word) for word in negative_words]
    if not negative_ids or positive_id in negative_ids:
        raise ConfigError(
            f"the NLI answers {positive_words} and {negative_words} start with the tokens {positive_id} and "
            f"{negative_ids}: give at least one negative answer, with another first token than the positive one."
        )
    return text, positive_id, sorted(set(negative_ids))


def _first_token(tokenizer: Any, word: str) -> int:
    ids: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] == tokenizer.unk_token_id:
        raise ConfigError(f"the NLI answer {word!r} is not in the tokenizer's vocabulary: choose another word.")
    return ids[0]


def _decoder_start(model: Any) -> int:
    start = model.generation_config.decoder_start_token_id
    start = model.config.decoder_start_token_id if start is None else start
    if start is None:
        raise ConfigError("the NLI model has no decoder_start_token_id: set it in its config (T5 uses the pad token).")
    return int(start)
