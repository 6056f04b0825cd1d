"""Micro-batches of a step, split into parts if they are too large: same samples, same gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from bondlm.engines.agreement import padded_logprobs
from bondlm.models.deepspeed import zero_stage
from bondlm.models.facts import vocabulary_size
from bondlm.models.head import positions_in_budget
from bondlm.models.logprobs import Group, by_length, collate, logit_positions, padded_tokens, token_logprobs
from bondlm.models.memory import try_or_halve
from bondlm.training.processes import World
from bondlm.training.rollout import Rollout

_T = TypeVar("_T")
Part = dict[str, Any]  # the tensors of one forward and backward pass
ADVICE_ALONE = "use a smaller max_completion_length, LoRA, or gradient_checkpointing"
ADVICE_TOGETHER = (
    "neither several processes nor DeepSpeed can try again with less. Set max_tokens_per_micro_batch below that, "
    "or use LoRA, gradient_checkpointing or a smaller max_completion_length"
)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Some prompts of a rollout, with the means to turn any of them into tensors."""

    rollout: Rollout
    groups: Sequence[Group]  # those of the rollout
    chosen: Sequence[int]  # places in it
    pad_id: int
    start_id: int | None = None
    share_prompts: bool = True
    multiple: int = 1  # of the columns of a row
    num_parts: int = 1  # minimum number of parts: as many as another process needs

    @property
    def num_counted(self) -> int:
        """Number of prompts with a weight in the loss."""
        return int(self.rollout.is_counted_P[list(self.chosen)].sum())

    def rows(self, chosen: Sequence[int]) -> list[Group]:
        """Rows of the model's input: a prompt with all of its completions, or with one of them."""
        groups = [self.groups[i] for i in chosen]
        if self.share_prompts:
            return groups
        return [(prompt, [completion]) for prompt, completions in groups for completion in completions]

    def num_tokens(self, rows: Sequence[Group]) -> int:
        """Tokens of these rows, padding included."""
        return padded_tokens(rows, is_encoder_decoder=self.start_id is not None, multiple=self.multiple)

    def part(self, chosen: Sequence[int], max_tokens: int | None = None) -> Part:
        """These prompts as tensors; a single one with more than `max_tokens` is split by completions into `pieces`."""
        rows, picked = self.rows(chosen), list(chosen)
        tensors = {name: tensor[picked] for name, tensor in self.rollout.tensors.items()}
        length = max(len(c) for _, completions in rows for c in completions)
        sampled = padded_logprobs([self.rollout.compared[i] for i in chosen], length)
        part = tensors | {"row_P": torch.tensor(picked), "sampled_PCT": sampled}
        if max_tokens is None or len(chosen) > 1 or self.num_tokens(rows) <= max_tokens:
            return self._collated(rows) | part
        prompt, completions = self.groups[chosen[0]]

        def as_rows(some: Sequence[Sequence[int]]) -> list[Group]:
            return [(prompt, some)] if self.share_prompts else [(prompt, [completion]) for completion in some]

        pieces = cut(completions, lambda some: self.num_tokens(as_rows(some)) <= max_tokens)
        return part | {"pieces": [self._collated(as_rows(some)) for some in pieces]}

    def _collated(self, rows: Sequence[Group]) -> dict[str, Tensor]:
        return collate(rows, self.pad_id, start_id=self.start_id, multiple=self.multiple)


class SmallerBatches:
    """Cuts the micro-batches of a step to fit into memory, and keeps the size for the rest of the run.

    The size is a number of tokens, because tokens fill the memory: many short prompts are learned from together, and a
    batch longer than the one that failed is cut before it fails. An error in the backward pass leaves gradients of only
    some parameters added. So the gradients of the step are discarded, and all of its micro-batches so far are learned
    from again.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        """At most `max_tokens` per pass, padding included; None: whole micro-batches until an error."""
        self.asked, self.max_tokens = max_tokens, max_tokens
        self._all_logits: nn.Module | None = None
        self._window: list[MicroBatch] = []

    def within_budget(self, model: nn.Module) -> None:
        """Limit prompts per pass by the size of the logits, if `model` makes logits for all columns."""
        self._all_logits = model

    def state(self) -> dict[str, int | None]:
        """The size found so far, for a checkpoint."""
        return {"asked": self.asked, "max_tokens": self.max_tokens}

    def load_state(self, state: dict[str, int | None]) -> None:
        """Continue with the size found before, unless another one is requested now."""
        if state["asked"] == self.asked:
            self.max_tokens = state["max_tokens"]

    def agreed(self, batches: list[MicroBatch], world: World) -> list[MicroBatch]:
        """Give every process as many passes as the one that needs most: each exchanges weights and gradients.

        Every process must call.
        """
        if world.is_alone or (self.max_tokens is None and self._all_logits is None):
            return batches
        needed = world.max(torch.tensor([len(self._cut(batch)) for batch in batches])).tolist()
        return [replace(batch, num_parts=parts) for batch, parts in zip(batches, needed, strict=True)]

    def learn(self, model: nn.Module, batch: MicroBatch, step: Callable[[Part, bool], Tensor], args: Any) -> Tensor:
        """Forward and backward of one micro-batch by `step(part, whether it is the last one)`; returns its loss.

        Raises:
            ResourceError: not even one completion fits; or other processes wait for this one's gradients; or DeepSpeed
                holds them.
        """
        if len(self._window) == args.gradient_accumulation_steps or all(p.grad is None for p in model.parameters()):
            self._window = []  # a new step
        self._window.append(batch)
        loss = self._learn([batch], step, args)
        while loss is None:
            model.zero_grad(set_to_none=True)
            loss = self._learn(self._window, step, args)
        return loss

    def _learn(self, todo: Sequence[MicroBatch], step: Callable[[Part, bool], Tensor], args: Any) -> Tensor | None:
        """Learn from the micro-batches, part by part; the loss of the last of them, or None if one does not fit."""
        is_alone = args.world_size == 1 and zero_stage(args) == 0
        parts = [(batch, chosen) for batch in todo for chosen in self._cut(batch)]
        losses: list[Tensor] = []
        for batch, chosen in parts:
            part = batch.part(chosen, self.max_tokens if is_alone else None)
            completions, tokens = size_of(part)
            loss, size = try_or_halve(
                partial(step, part, len(losses) + 1 == len(parts)),
                tokens,
                "tokens",
                doing=f"learning from {completions} completion(s),",
                advice=ADVICE_ALONE if is_alone else ADVICE_TOGETHER,
                may_halve=is_alone and completions > 1,
            )
            if loss is None:
                self.max_tokens = size
                return None
            losses.append(loss)
        return torch.stack([loss for loss, (batch, _) in zip(losses, parts, strict=True) if batch is todo[-1]]).sum()

    def _cut(self, batch: MicroBatch) -> list[Sequence[int]]:
        """The prompts of each part."""

        def fits(chosen: Sequence[int]) -> bool:
            rows, model = batch.rows(chosen), self._all_logits
            if self.max_tokens is not None and batch.num_tokens(rows) > self.max_tokens:
                return False
            if model is None:
                return True
            return logit_positions(model, rows, batch.multiple) <= positions_in_budget(vocabulary_size(model.config))

        if batch.num_parts == 1 and fits(batch.chosen):
            return [batch.chosen]
        order = by_length([batch.groups[i] for i in batch.chosen])
        parts = cut([batch.chosen[i] for i in order], fits)
        while len(parts) < batch.num_parts:  # at most one per prompt: all processes have as many prompts
            longest = parts.pop(max(range(len(parts)), key=lambda i: len(parts[i])))
            parts += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
        return parts


def cut(items: Sequence[_T], fits: Callable[[Sequence[_T]], bool]) -> list[Sequence[_T]]:
    """Group neighbours as long as they fit; single items if not even two fit."""
    parts, begin = [], 0
    for end in range(2, len(items) + 1):
        if not fits(items[begin:end]):
            parts.append(items[begin : end - 1])
            begin = end - 1
    return [*parts, items[begin:]]


def size_of(part: Part) -> tuple[int, int]:
    """Completions and tokens (padding included) of a part, or of its largest piece."""
    names, pieces = ("input_ids", "decoder_input_ids"), part.get("pieces", [part])
    sizes = [
        (piece["completion_ids"].shape[:2].numel(), sum(piece[name].numel() for name in names if name in piece))
        for piece in pieces
    ]
    return max(sizes, key=lambda size: (size[0] > 1, size[1]))


def learned_logprobs(model: Any, part: Part, num_learned: int, head: nn.Module | None) -> Tensor:
    """`token_logprobs` of a part (P, L, T), with gradient.

    Each of the `pieces` is recomputed in the backward pass, so that memory holds the activations of only one, however
    the loss combines them.
    """
    if "pieces" not in part:
        return token_logprobs(model, part, head=head).flatten(0, 1).unflatten(0, (-1, num_learned))
    made = [checkpoint(token_logprobs, model, piece, None, head, use_reentrant=False) for piece in part["pieces"]]
    length = part["sampled_PCT"].shape[2]
    return torch.cat([pad(logp.flatten(0, 1), (0, length - logp.shape[2])) for logp in made]).unsqueeze(0)
