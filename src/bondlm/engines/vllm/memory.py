"""Share one card between a trainer and its vLLM server: reserve what the trainer will need; the server gets the rest.

Only arithmetic; sizes are bytes. Rough estimates are on the high side: a server with a smaller cache is slower, but a
trainer without memory fails.
"""

import math
from dataclasses import dataclass
from typing import Any

from bondlm.engines.local.batch_size import cache_bytes
from bondlm.errors import ConfigError
from bondlm.models.facts import hidden_size, layer_kinds, text_config
from bondlm.models.head import LOGITS_BUDGET

GIB = 2**30
MARGIN = 0.03  # of the card: fragmentation, and the driver
OVERHEAD = 3 * GIB  # of a server: its context, CUDA graphs, and the activations and logits of its largest batch
ASLEEP = 2 * GIB  # what a server keeps while it sleeps: context and CUDA graphs
LOGITS = 3 * LOGITS_BUDGET  # for one piece of the head: logits, their softmax and its gradient
# Bytes of optimizer states per trained parameter, by the prefix of the optimizer's name; otherwise two fp32 moments.
STATES = {"sgd": 0, "adafactor": 1, "lion": 4, "adagrad": 4, "rmsprop": 4}
TWO_MOMENTS = 8


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The memory that a trainer takes beyond what it has when the server starts."""

    resting: int  # while the server draws or receives weights
    learning: int  # at most, including `resting`: gradients and activations, or a whole copy that scores
    at_least: int  # the same with the smallest micro-batches that its own can be cut into


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of a card that a server gets, and why."""

    total: int
    server: int
    growth: Growth
    sleeps: bool
    cuts: bool  # whether micro-batches must be cut to fit

    @property
    def utilization(self) -> float:
        """The value for --gpu-memory-utilization, rounded down."""
        return math.floor(1000 * self.server / self.total) / 1000

    def __str__(self) -> str:
        how = "while the server sleeps" if self.sleeps else "beside it"
        return (
            f"vLLM gets {self.server / GIB:.1f} of {self.total / GIB:.1f} GiB (--gpu-memory-utilization "
            f"{self.utilization:.3f}); the trainer will need up to {self.growth.learning / GIB:.1f} GiB more than it "
            f"has now, {how}" + (", and will cut its micro-batches to what fits" if self.cuts else "")
        )


def optimizer_bytes(name: str) -> int:
    """Bytes of an optimizer's states per trained parameter, from its name in `optim`."""
    found = next((size for start, size in STATES.items() if name.startswith(start)), TWO_MOMENTS)
    return math.ceil(found / 4) if "8bit" in name else found


def activation_bytes(config: Any, tokens: int, element_size: int, *, checkpointing: bool) -> int:
    """Bytes that a forward pass over this many tokens keeps for the backward pass.

    For each layer and token, 10 vectors of the hidden size and 4 of the inner size, assuming attention without a matrix
    of scores; with checkpointing one vector per layer and token, and one layer in full.
    """
    text = text_config(config)
    width, layers = hidden_size(config), int(getattr(text, "num_hidden_layers", len(layer_kinds(config))))
    inner = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width)
    layer = tokens * element_size * (10 * width + 4 * inner)
    return layer + layers * tokens * element_size * width if checkpointing else layers * layer


def growth(*, staying: int, gradients: int, activations: int, least_activations: int, visiting: int) -> Growth:
    """The memory that the trainer will take.

    Args:
        staying: what is allocated in the first step and stays: the optimizer's states, averaged weights; for a sharded
            model also this process's part of the roles.
        gradients: those of this process.
        activations: those of one micro-batch.
        least_activations: those of the smallest micro-batch that the trainer can cut it into.
        visiting: a temporary whole copy of the weights, to be sent or to score: a full reference that is kept on the
            CPU, or sharded weights that are gathered.
    """
    learning, at_least = (
        staying + max(gradients + size, visiting) + LOGITS for size in (activations, least_activations)
    )
    return Growth(resting=staying + visiting, learning=learning, at_least=at_least)


def server_needs(config: Any, num_weights: int, element_size: int, longest: int) -> int:
    """The minimum for a server: weights, the cache of one sequence of `longest` tokens, overhead."""
    return num_weights * element_size + longest * cache_bytes(config, element_size) + OVERHEAD


def share_card(*, total: int, free: int, growth: Growth, least: int, sleeps: bool) -> Share:
    """The part of a card's `free` bytes that the server gets; the trainer's weights are already on the card.

    Args:
        total: bytes of the card.
        free: free bytes at the server's start.
        growth: what the trainer will take from then on.
        least: the minimum for the server.
        sleeps: whether the server releases its memory while the trainer learns.

    Raises:
        ConfigError: they do not fit together; the message says by how much.
    """
    usable = free - int(MARGIN * total)
    missing = least - (usable - (growth.resting if sleeps else growth.at_least))
    if sleeps:
        missing = max(missing, growth.at_least + ASLEEP - usable)
    if missing > 0:
        advice = "" if sleeps else "vllm_sleep='auto', "
        raise ConfigError(
            f"vllm_server=auto: {missing / GIB:.1f} GiB are missing for trainer and server on one card. Of "
            f"{total / GIB:.1f} GiB {free / GIB:.1f} are free; the server needs {least / GIB:.1f}, the trainer "
            f"{growth.at_least / GIB:.1f} more than it has now (computed, docs/vllm.md). Use {advice}LoRA, a smaller "
            "per_device_train_batch_size with more gradient_accumulation_steps, gradient_checkpointing, or a server "
            "on another card (vllm_base_url)"
        )
    server = usable - (growth.resting if sleeps else growth.learning)
    if not sleeps:  # if micro-batches must be cut anyway, each gets half of what is left beyond the minimum of both
        server = max(server, least + (usable - growth.at_least - least) // 2)
    cuts = growth.learning + (ASLEEP if sleeps else server) > usable
    return Share(total=total, server=server, growth=growth, sleeps=sleeps, cuts=cuts)
