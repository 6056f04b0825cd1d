"""The moving anchor (Sessa et al. 2024, sections 4.3 and 5).

The anchor's master copy is fp32 for any dtype of the weights: in bf16 an average with mixing rate 0.02 does not move at
all (each step is smaller than half the spacing of the numbers), and J-BOND would silently become BOND with a fixed
anchor.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bondlm.config import AnchorSchedule
from bondlm.models.sharding import (
    assign,
    copied,
    gather_to_main,
    is_sharded,
    local,
    num_copies,
    refuse_other_tensors,
    whole_shape,
)

Pairs = Sequence[tuple[str, Tensor, nn.Parameter]]  # (name, anchor weight, policy parameter)


class Anchor:
    """Moves the anchor's parameters towards the policy's.

    With LoRA the factors A and B are averaged separately, so the anchor's product is not exactly the average of the
    products. With sharded weights each process averages its own part; only two sums, for the metrics, are exchanged.
    """

    def __init__(self, pairs: Pairs, *, schedule: AnchorSchedule, eta: float, update_every: int) -> None:
        """`pairs` are (name, anchor weight, policy parameter); `eta` in [0, 1] is the mixing rate of Eq. 18."""
        self.before_other_weights: Callable[[], object] = lambda: None  # called before other weights are loaded
        self._schedule, self._eta, self._update_every = schedule, eta, update_every
        self.bind(pairs)

    def bind(self, pairs: Pairs) -> None:
        """Use these weights from now on: wrapping a model to shard it replaces its weights."""
        self._pairs = list(pairs)
        self._master: dict[str, Tensor] = {
            # The parameter itself, not its `.data`: FSDP may move a sharded parameter to other memory.
            name: anchor if anchor.dtype == torch.float32 else copied(anchor, torch.float32)
            for name, anchor, _ in pairs
        }
        self._is_sharded = any(is_sharded(tensor) for tensor in self._master.values())

    @property
    def weights(self) -> list[Tensor]:
        """This process's fp32 master copy, sharded or not."""
        return list(self._master.values())

    @property
    def num_bytes(self) -> int:
        """Size of the whole fp32 master copy."""
        return sum(4 * whole_shape(tensor).numel() for tensor in self._master.values())

    def is_copied_at(self, step: int) -> bool:
        """Whether optimizer step number `step` (from 1) ends a period of Algorithm 1."""
        return self._schedule == "periodic" and step % self._update_every == 0

    @torch.no_grad()
    def update(self, step: int) -> dict[str, float]:
        """Move after optimizer step number `step` (from 1); returns what to log.

        ema: anchor <- (1 - eta) anchor + eta policy at every step (Eq. 18). periodic: a copy at every `update_every`-th
        step (Algorithm 1). fixed: never.
        """
        if self._schedule == "ema":
            rate = self._eta
        else:
            rate = 1.0 if self.is_copied_at(step) else 0.0
        moved_sq, gap_sq = 0.0, 0.0
        for name, anchor, policy in self._pairs:
            copies = num_copies(self._master[name])
            master = local(self._master[name])
            target = local(policy).detach().to(master.device, master.dtype)  # the anchor may be on the CPU
            gap_sq += float((target - master).square().sum()) / copies
            if rate == 0:
                continue
            before = master.clone()
            master.lerp_(target, rate)  # exact at rate 1, where it copies
            if anchor.dtype != torch.float32:
                local(anchor).copy_(master)
            moved_sq += float((master - before).square().sum()) / copies
        if self._is_sharded:
            sums = torch.tensor([moved_sq, gap_sq], dtype=torch.float64, device=master.device)
            torch.distributed.all_reduce(sums)
            moved_sq, gap_sq = sums.tolist()
        metrics = {"anchor/distance": math.sqrt(gap_sq)}
        if rate > 0 and gap_sq > 0:
            metrics["anchor/gap_closed"] = math.sqrt(moved_sq) / (rate * math.sqrt(gap_sq))
        return metrics

    def state_dict(self, *, is_main: bool = True) -> dict[str, Tensor]:
        """The fp32 master copy, by parameter name.

        If it is sharded, every process must call this: it is gathered, tensor by tensor, on the CPU of the process with
        `is_main`; the others get an empty dictionary.
        """
        if self._is_sharded:
            return gather_to_main(self._master, is_main=is_main)
        return {name: tensor.detach().contiguous() for name, tensor in self._master.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the master copy and the weights made from it; names and shapes must match exactly."""
        refuse_other_tensors("the anchor's state", state, self._master)
        if not self._is_sharded and any(
            not torch.equal(m.cpu(), state[name].cpu()) for name, m in self._master.items()
        ):
            self.before_other_weights()
        for name, anchor, _ in self._pairs:
            assign(self._master[name], state[name])
            if anchor.dtype != torch.float32:
                local(anchor).copy_(local(self._master[name]))
