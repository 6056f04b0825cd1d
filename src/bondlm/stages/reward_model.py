"""A reward model from human preferences: the Bradley-Terry model on a sequence classifier with one output.

    P(chosen beats rejected) = sigmoid(r(chosen) - r(rejected))     (Bradley and Terry 1952; as in arXiv 2203.02155)

or sigmoid(r(chosen) - r(rejected) - margin) for pairs with a `margin` (arXiv 2307.09288, section 3.2.2).

Shapes: B pairs, T tokens (padded).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, set_seed

from bondlm.bestofn import Estimate
from bondlm.bestofn.bootstrap import bootstrap_win_rate
from bondlm.data.paths import refuse_absent_folder, why_not_loaded
from bondlm.errors import ConfigError, DataError, NonFiniteError, listed
from bondlm.models.adapters import wrap_adapter
from bondlm.models.load import from_safetensors, refuse_missing, refused
from bondlm.rewards.batching import pad_right, padding_matters
from bondlm.rewards.classifier import FALLBACK_TEMPLATES, SequenceClassifierReward
from bondlm.rewards.texts import bad_lengths, check_choice, token_limit
from bondlm.stages.rows import MARGIN, places_of
from bondlm.stages.trainer import StageTrainer

_log = logging.getLogger(__name__)


def load_base(name: str, *, seed: int = 42) -> tuple[Any, Any]:
    """A pretrained encoder or language model with a fresh head of one output, and its tokenizer.

    Only the head may be random, since it will be trained. A tokenizer without a chat template gets a plain one, so that
    the saved reward can score conversations.

    Raises:
        ConfigError: the model cannot be loaded, weights below the head are missing, or padding changes its scores.
    """
    refuse_absent_folder(name, "model")
    if (Path(name) / "adapter_config.json").is_file():
        raise ConfigError(f"{name!r} is an adapter: merge it into its base first, or give the base")
    torch.manual_seed(seed)
    with refused(lambda e: f"cannot load {name!r} as the base of a reward model: {why_not_loaded(name, e)}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = from_safetensors(AutoModelForSequenceClassification, name, num_labels=1, dtype=torch.float32)
    if padding_matters(model):
        raise ConfigError(
            f"{name!r} is a {model.config.model_type}, in which padding changes the scores, but training pads: take a "
            "base of another family, such as BERT, DeBERTa or Qwen"
        )
    body = f"{model.base_model_prefix}."
    of_body = {
        "missing_keys": [key for key in info["missing_keys"] if key.startswith(body)],
        "mismatched_keys": [each for each in info["mismatched_keys"] if each[0].startswith(body)],
        "unexpected_keys": info["unexpected_keys"],
    }
    refuse_missing(f"the model {name!r}", model, of_body, may_miss="pooler")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = FALLBACK_TEMPLATES["decoder" if tokenizer.sep_token is None else "encoder"]
    if model.config.pad_token_id is None:
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return model, tokenizer


class Pairs:
    """Encodes preference pairs exactly as `SequenceClassifierReward` will when it scores."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int | None = None,
        prompt_format: Literal["auto", "chat", "plain"] = "auto",
    ) -> None:
        """Set up with the encoding of the reward.

        Raises:
            ConfigError: another format; a model that is trained here gets one text.
        """
        check_choice("prompt_format", prompt_format, ("auto", "chat", "plain"))
        was_trainable = [parameter.requires_grad for parameter in model.parameters()]
        self._reward = SequenceClassifierReward(model, tokenizer, max_length=max_length, prompt_format=prompt_format)
        self.prompt_format = self._reward.prompt_format  # how the model gets plain text
        for parameter, trainable in zip(model.parameters(), was_trainable, strict=True):
            parameter.requires_grad_(trainable)  # the reward froze it
        self._pad_id = int(model.config.pad_token_id)
        self._limit = token_limit(model, tokenizer, max_length)
        self._specials, self._is_warned = tokenizer.all_special_tokens, False

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
        """Token ids of both answers, each after its prompt.

        Raises:
            DataError: rows that are too long for the model, refused by its chat template, or without a difference
                between their answers but for end tokens, named by place.
        """
        where, names, problems = places_of(rows), ("chosen", "rejected"), []
        encoded = [{name: self._ids(row, name, where(i)) for name in names} for i, row in enumerate(rows)]
        for name in names:
            wrong = bad_lengths([row[name] for row in encoded], self._limit, "shorten the texts, or leave the row out")
            problems += [f"{where(i)}: `{name}`: the reward model {failure.reason}" for i, failure in wrong.items()]
        for i, row in enumerate(rows):
            texts = [self._without_end(row[name]).strip() for name in names]
            if not all(texts) or texts[0] == texts[1]:
                problems.append(f"{where(i)}: without end tokens an answer is empty, or both are equal: remove the row")
        if problems:
            raise DataError(listed(problems, "bad rows"))
        return encoded

    def _ids(self, row: Mapping[str, Any], name: str, place: str) -> list[int]:
        prompt, answer = row["prompt"], self._without_end(row[name])
        try:
            return self._reward.encode(
                prompt, answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
            )
        except DataError as error:
            raise DataError(f"{place}: `{name}`: {error}") from error

    def _without_end(self, answer: str) -> str:
        """The answer as a reward gets it: its text holds no end token, which the encoding writes."""
        text = answer.rstrip()
        end = next((token for token in self._specials if text.endswith(token)), None)
        if end is None:
            return answer
        if not self._is_warned:
            self._is_warned = True
            _log.warning("the text of answers ends with %r: it is left out, as no reward gets it", end)
        return self._without_end(text.removesuffix(end))

    def collate(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """2B padded rows, all chosen ones first."""
        ids = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        return pad_right({"input_ids": ids}, list(range(len(ids))), self._pad_id, "cpu")

    def with_margins(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The same batch for training, with each pair's `margin` (B,)."""
        return self.collate(rows) | {MARGIN: margin_of(rows)}


def margin_of(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """The margin of each row (B,), 0 where it has none."""
    return torch.tensor([row.get(MARGIN, 0.0) for row in rows], dtype=torch.float32)


class PreferenceTrainer(StageTrainer):
    """`transformers.Trainer` with the Bradley-Terry loss."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of `-log sigmoid(r(chosen) - r(rejected) - margin)` over the pairs.

        Without labels Trainer counts no items.
        """
        margins_B = margins(model, {name: t for name, t in inputs.items() if name != MARGIN})
        loss = -logsigmoid(margins_B - inputs[MARGIN]).mean()
        return (loss, {"margins": margins_B}) if return_outputs else loss


def margins(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """r(chosen) - r(rejected) of each pair (B,), from a batch of `Pairs.collate`."""
    scores = model(**inputs).logits[:, 0].float()
    return scores[: len(scores) // 2] - scores[len(scores) // 2 :]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often the reward agrees with people on unseen pairs."""

    accuracy: Estimate  # interval over prompts, ties count half
    pairs: int
    prompts: int
    margin: float


@torch.no_grad()
def margins_of(model: Any, pairs: Pairs, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 32) -> Tensor:
    """r(chosen) - r(rejected) of every row (B,), without dropout; float64 on the CPU."""
    model.eval()
    margin_B = torch.zeros(len(rows), dtype=torch.float64)
    for chunk, inputs in in_batches(pairs, rows, batch_size, model.device):
        margin_B[chunk] = margins(model, inputs).double().cpu()
    return margin_B


def in_batches(
    pairs: Pairs, rows: Sequence[Mapping[str, Any]], batch_size: int, device: Any
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of rows of similar length: their places in `rows`, and the model's inputs."""
    encoded = pairs.encode(rows)
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]["chosen"]) + len(encoded[i]["rejected"]))
    for start in range(0, len(rows), batch_size):
        chunk = order[start : start + batch_size]
        yield chunk, {name: t.to(device) for name, t in pairs.collate([encoded[i] for i in chunk]).items()}


def accuracy_of(margin_B: Tensor, rows: Sequence[Mapping[str, Any]]) -> Accuracy:
    """Share of pairs whose chosen answer scores higher: the mean over prompts of each prompt's share.

    Raises:
        NonFiniteError: a margin is NaN or infinite.
    """
    wrong = (~margin_B.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise NonFiniteError(
            f"the rewards of {len(wrong)} of {len(rows)} held-out pairs are not finite (first: pair {wrong[0]}, margin "
            f"{margin_B[wrong[0]].item()}): lower learning_rate"
        )
    wins_B = (margin_B > 0).double() + 0.5 * (margin_B == 0).double()
    by_prompt: dict[str, list[float]] = {}
    for row, win in zip(rows, wins_B.tolist(), strict=True):
        by_prompt.setdefault(repr(row["prompt"]), []).append(win)
    shares = torch.tensor([sum(wins) / len(wins) for wins in by_prompt.values()], dtype=torch.float64)
    return Accuracy(
        accuracy=bootstrap_win_rate(shares), pairs=len(rows), prompts=len(by_prompt), margin=float(margin_B.mean())
    )


def preference_trainer(
    model: Any,
    tokenizer: Any,
    train_rows: Sequence[Mapping[str, Any]],
    args: TrainingArguments,
    *,
    peft_config: PeftConfig | None = None,
    max_length: int | None = None,
    prompt_format: Literal["auto", "chat", "plain"] = "auto",
) -> tuple[PreferenceTrainer, Pairs]:
    """A trainer for rows `{"prompt", "chosen", "rejected"}`, perhaps with a `margin`, and its encoder for evaluation.

    Raises:
        ConfigError: the model cannot be used.
        DataError: rows are too long for the model.
    """
    pairs = Pairs(model, tokenizer, max_length, prompt_format)
    margins_N = margin_of(train_rows).tolist()
    train = [{**ids, MARGIN: margin} for ids, margin in zip(pairs.encode(train_rows), margins_N, strict=True)]
    if peft_config is not None:
        set_seed(args.seed)  # a fresh adapter is random, and Trainer would seed only after creating it
        peft_config.task_type = "SEQ_CLS"  # type: ignore[assignment]  # this keeps the head trainable
        model = wrap_adapter(model, peft_config)
    model.train()
    trainer = PreferenceTrainer(
        model=model,
        args=args,
        data_collator=pairs.with_margins,
        train_dataset=train,
        processing_class=tokenizer,  # type: ignore[arg-type]
    )
    return trainer, pairs
