"""Supervised fine-tuning: the stage before BOND. Cross-entropy of only the answer's tokens, given the prompt.

Shapes: B rows, T tokens (padded), V words of the vocabulary.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput

from bondlm.data.paths import expanded, located
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.rendering import Rendering
from bondlm.errors import ConfigError, DataError
from bondlm.models.adapters import wrap_adapter
from bondlm.models.load import load_model, load_tokenizer
from bondlm.stages.rows import places_of
from bondlm.stages.trainer import StageTrainer

IGNORED = -100  # a label that every transformers model ignores


def prepare_model(name: str, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """Load a model to fine-tune: fp32 weights, with a fresh adapter if one is requested.

    Raises:
        ConfigError: it cannot be loaded, or has an adapter already.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise ConfigError(f"model={name!r} is an adapter: merge it into its base first, or give the base")
    model: Any = load_model(name, dtype=torch.float32)
    return model if peft_config is None else wrap_adapter(model, peft_config)


class Examples:
    """Encodes rows as the policy will later read and write them: same prompt ids, same end of an answer."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_prompt_length: int | None,
        max_completion_length: int,
        rendering: Rendering = Rendering(),  # noqa: B008  it is frozen
    ) -> None:
        """Determine how the model's prompts and answers end.

        Raises:
            ConfigError: the tokenizer has no end-of-sequence token.
        """
        limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
        self._encoder = PromptEncoder.of_model(model, tokenizer, rendering=rendering, **limits)
        self.is_encoder_decoder = self._encoder.start_id is not None
        padding = copy.deepcopy(tokenizer)  # padded right, with a padding id, regardless of the saved tokenizer
        padding.padding_side, padding.pad_token_id = "right", self._encoder.pad_id
        self.collate = DataCollatorForSeq2Seq(padding, model=model, label_pad_token_id=IGNORED)

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
        """The model's inputs for rows `{"prompt", "completion"}`; the labels are the answers' tokens.

        Raises:
            DataError: prompts that cannot be used, or answers longer than `max_completion_length`, named by place.
        """
        texts, where = [row["prompt"] for row in rows], places_of(rows)
        prompts = self._encoder.encode(texts, rows, where=where)
        answers = self._encoder.encode_answers([row["completion"] for row in rows], texts, where)
        most = self._encoder.max_completion_length
        long = [i for i, ids in enumerate(answers) if len(ids) > most]
        if long:
            raise DataError(
                f"{len(long)} of {len(rows)} answers are longer than max_completion_length={most} tokens (first: "
                f"{where(long[0])} with {len(answers[long[0]])}): raise it, or leave those rows out"
            )
        return [self._inputs(p, c) for p, c in zip(prompts, answers, strict=True)]

    def _inputs(self, prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
        if self.is_encoder_decoder:
            ids, labels = prompt, answer
        else:
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


class SFTTrainer(StageTrainer):
    """`transformers.Trainer` whose evaluation is a mean over tokens, where Trainer's is a mean over batches."""

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, None]:
        """Sum of `-log p` over the tokens of each row's answer, and the number of these tokens (B, 2)."""
        inputs = self._prepare_inputs(inputs)
        labels_BT = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits_BTV = model(**inputs).logits[:, -labels_BT.shape[1] :]  # without an adapter's virtual tokens
        if not self.model.config.is_encoder_decoder:  # type: ignore[union-attr]
            logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
        # Row by row, to avoid an fp32 copy of all logits.
        sums = [cross_entropy(row.float(), to, reduction="sum") for row, to in zip(logits_BTV, labels_BT, strict=True)]
        return None, torch.stack([torch.stack(sums), (labels_BT != IGNORED).sum(dim=1).float()], dim=1), None

    def evaluation_loop(self, *args: Any, **more: Any) -> EvalLoopOutput:
        """Trainer's loop, with `eval_loss` as the mean of `-log p` over all tokens of all rows, for any batch size."""
        output: Any = super().evaluation_loop(*args, **more)
        total, tokens = np.asarray(output.predictions, dtype=np.float64).sum(axis=0)
        output.metrics[f"{more.get('metric_key_prefix', 'eval')}_loss"] = float(total / tokens)
        return output  # type: ignore[no-any-return]


def sft_trainer(
    name: str,
    train_rows: Sequence[Mapping[str, Any]],
    eval_rows: Sequence[Mapping[str, Any]],
    args: TrainingArguments,
    *,
    peft_config: PeftConfig | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int = 256,
    rendering: Rendering = Rendering(),  # noqa: B008  it is frozen
) -> SFTTrainer:
    """A `transformers.Trainer` for rows `{"prompt", "completion"}`: text or messages, causal or encoder-decoder.

    Raises:
        ConfigError: the model cannot be used.
        DataError: rows cannot be used.
    """
    name = located(expanded(name))  # an adapter stores it
    set_seed(args.seed)  # a fresh adapter is random: Trainer would seed only after it is made
    model: Any = prepare_model(name, peft_config)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    tokenizer = load_tokenizer(name)
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    examples = Examples(core, tokenizer, rendering=rendering, **limits)  # type: ignore[arg-type]
    return SFTTrainer(
        model=model,
        args=args,
        data_collator=examples.collate,
        train_dataset=examples.encode(train_rows),  # type: ignore[arg-type]
        eval_dataset=examples.encode(eval_rows) if eval_rows else None,  # type: ignore[arg-type]
        processing_class=tokenizer,
    )
