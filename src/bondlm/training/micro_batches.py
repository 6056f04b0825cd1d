"""Micro-batches of a step; after an out-of-memory error smaller ones, from the same samples, with the same gradient."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bondlm.engines.agreement import padded_logprobs
from bondlm.models.deepspeed import zero_stage
from bondlm.models.facts import vocabulary_size
from bondlm.models.head import positions_in_budget
from bondlm.models.logprobs import collate
from bondlm.models.memory import try_or_halve
from bondlm.training.rollout import Rollout

MicroBatch = dict[str, Any]


class SmallerBatches:
    """Cuts the micro-batches of a step to what the memory holds, and remembers the size for the rest of the run.

    An error in the backward pass leaves gradients of some parameters added and others not. So the gradients of the
    step are thrown away, and all of its micro-batches up to here are learned from again.
    """

    def __init__(self) -> None:
        """Whole micro-batches until an error, or whoever knows better, says otherwise."""
        self.max_prompts: int | None = None
        self._window: list[MicroBatch] = []

    def within_budget(self, config: Any, num_positions: int) -> None:
        """Only as many prompts at a time as make logits of a fixed size, for a model that makes those of all columns.

        `num_positions` is the most that one prompt's completions have. It comes from settings alone, so that every rank
        cuts alike.
        """
        self.max_prompts = max(1, positions_in_budget(vocabulary_size(config)) // num_positions)

    def learn(
        self, model: nn.Module, batch: MicroBatch, step: Callable[[MicroBatch, bool], Tensor], args: Any
    ) -> Tensor:
        """Forward and backward of one micro-batch by `step(part, whether it is the last one)`; returns its loss.

        Raises:
            ResourceError: not even one prompt fits, or other processes wait for this one's gradients, or DeepSpeed
                keeps them.
        """
        if len(self._window) == args.gradient_accumulation_steps or all(p.grad is None for p in model.parameters()):
            self._window = []  # a new step
        self._window.append(batch)
        todo = [batch]
        while True:
            loss, size = try_or_halve(
                partial(self._learn, todo, step),
                self._size(),
                "prompts",
                doing="learning from",
                advice="use a smaller per_device_train_batch_size with more gradient_accumulation_steps, a smaller "
                "max_completion_length, LoRA, or gradient_checkpointing",
                may_halve=args.world_size == 1 and zero_stage(args) == 0,
            )
            if loss is not None:
                return loss
            self.max_prompts, todo = size, self._window
            model.zero_grad(set_to_none=True)

    def _learn(self, todo: Sequence[MicroBatch], step: Callable[[MicroBatch, bool], Tensor]) -> Tensor:
        """Learn from the micro-batches, part by part; returns the loss of the last of them."""
        pieces = [part for each in todo for part in parts(each, self.max_prompts)]
        losses = [step(part, i == len(pieces)) for i, part in enumerate(pieces, start=1)]
        return torch.stack(losses[-len(parts(todo[-1], self.max_prompts)) :]).sum()

    def _size(self) -> int:
        """Most prompts that are learned from at a time."""
        most = max(num_prompts(each) for each in self._window)
        return most if self.max_prompts is None else min(self.max_prompts, most)


def micro_batch(
    rollout: Rollout,
    chosen: Sequence[int],
    pad_id: int,
    *,
    start_id: int | None,
    share_prompts: bool,
    multiple: int = 1,
) -> MicroBatch:
    """The `chosen` prompts of a rollout as tensors; their rows have a `multiple` of so many columns."""
    groups = [rollout.groups[i] for i in chosen]
    if not share_prompts:
        groups = [(prompt, [completion]) for prompt, completions in groups for completion in completions]
    tensors = {name: tensor[chosen] for name, tensor in rollout.tensors.items()}
    batch = collate(groups, pad_id, start_id=start_id, multiple=multiple) | tensors
    length = batch["completion_ids"].shape[-1]
    batch["row_P"] = torch.tensor(chosen)
    return batch | {"sampled_PCT": padded_logprobs([rollout.compared[i] for i in chosen], length)}


def num_prompts(batch: MicroBatch) -> int:
    """Prompts of a collated micro-batch."""
    return len(batch["weight_P"])


def parts(batch: MicroBatch, max_prompts: int | None) -> list[MicroBatch]:
    """The micro-batch in parts of at most so many prompts; a tensor has one or several rows a prompt."""
    prompts = num_prompts(batch)
    if max_prompts is None or prompts <= max_prompts:
        return [batch]
    cuts = [(begin, min(begin + max_prompts, prompts)) for begin in range(0, prompts, max_prompts)]
    return [{name: _rows(name, tensor, begin, end, prompts) for name, tensor in batch.items()} for begin, end in cuts]


def _rows(name: str, tensor: Tensor, begin: int, end: int, prompts: int) -> Tensor:
    if name == "logits_to_keep":  # columns, the same for all rows
        return tensor
    each = len(tensor) // prompts
    return tensor[begin * each : end * each]
