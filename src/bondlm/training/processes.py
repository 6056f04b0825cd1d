"""What the processes of a run must agree on, and the checks that they do.

A disagreement raises no error by itself: gradients are averaged over different data or different weights, and the run
continues. So it is checked: data and settings at every step, weights at every save.
"""

import hashlib
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.state import GradientState
from accelerate.utils import broadcast_object_list, gather, gather_object
from torch import Tensor, nn

from bondlm.data.columns import PROMPT_IDS
from bondlm.errors import (
    BondError,
    DataDesyncError,
    LostRankError,
    WeightDesyncError,
)
from bondlm.models.sharding import is_sharded

_T = TypeVar("_T")
_TRANSPORTS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting", "tcpstore")
_OURS = str(Path(__file__).parent)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of a run, and their communication. A single process sends nothing.

    Every process must make the same calls in the same order.
    """

    size: int
    rank: int
    device: torch.device

    @classmethod
    def of(cls, args: Any) -> "World":
        """The processes according to the run's settings, once the launcher's variables are read."""
        return cls(size=args.world_size, rank=args.process_index, device=args.device)

    @property
    def is_alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, in order of their ranks, on the CPU; all have the same number of rows."""
        return tensor.cpu() if self.is_alone else gather(tensor.to(self.device).contiguous()).cpu()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self._reduced(tensor, torch.distributed.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over all processes."""
        return self._reduced(tensor, torch.distributed.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.max(torch.tensor(float(flag))).item())

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        if self.is_alone:
            return tensor
        reduced = tensor.to(self.device, copy=True)
        torch.distributed.all_reduce(reduced, op=how)
        return reduced

    def gather_objects(self, items: list[_T]) -> list[_T]:
        """The lists of all processes, concatenated."""
        return items if self.is_alone else list(gather_object(items))

    def barrier(self) -> None:
        """Wait until every process is here."""
        if not self.is_alone:
            torch.distributed.barrier()

    def mine(self, count: int) -> list[int]:
        """This process's share of the numbers below `count`."""
        return list(range(self.rank, count, self.size))


def work_digest(args: Any, dataset: Any) -> int:
    """A 63-bit digest of the settings and all encoded prompts; 0 if there is no other process to compare with."""
    if args.world_size == 1:
        return 0
    digest = hashlib.sha256(json.dumps(args.shared_settings(), sort_keys=True, default=str).encode())
    for batch in dataset.select_columns(PROMPT_IDS).with_format("arrow").iter(1000):
        digest.update(json.dumps(batch.column(0).to_pylist()).encode())
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def count_prompts(world: World, is_real: Sequence[bool], *, step: int, digest: int) -> Tensor:
    """Number of prompts of a step over all ranks, which must be at the same step of the same work.

    Raises:
        DataDesyncError: they are not.
    """
    mine = torch.tensor([[sum(is_real), step, digest]], dtype=torch.int64)
    ranks = world.gather(mine)
    for column, what in ((1, "are at different steps"), (2, "have different settings or prompts")):
        if not bool((ranks[:, column] == ranks[0, column]).all()):
            values = ", ".join(f"rank {i}: {value}" for i, value in enumerate(ranks[:, column].tolist()))
            raise DataDesyncError(
                f"step {step}: the processes {what} ({values}). Start every process with the same command and the "
                "same files."
            )
    return ranks[:, 0].sum().to(world.device)


def decided_by_main(decide: Callable[[], _T], world: World, *, wait_s: float | None) -> _T:
    """The result of `decide` on the main process, for all; an error that it raises there is raised by all.

    It is for data in the run folder that the main process may change.
    """
    outcome: list[Any] = [None]
    if world.is_main:
        try:
            outcome = [decide()]
        except BondError as error:
            outcome = [error]
    if not world.is_alone:
        with waiting_for_others(world, wait_s=wait_s):
            broadcast_object_list(outcome)
    if isinstance(outcome[0], BondError):
        raise outcome[0]
    return outcome[0]  # type: ignore[no-any-return]


@contextmanager
def waiting_for_others(world: World, *, wait_s: float | None) -> Iterator[None]:
    """If a collective fails, say which rank waited in vain, and where.

    Raises:
        LostRankError: another process died, or did not answer within `ddp_timeout`.
    """
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        if isinstance(error, BondError) or world.is_alone or not any(word in words for word in _TRANSPORTS):
            raise
        frame = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if _OURS in f.filename), None)
        place = "" if frame is None else f" in {frame.name} ({Path(frame.filename).name}:{frame.lineno})"
        raise LostRankError(
            f"rank {world.rank} of {world.size} waited in vain for another process{place}: it died, or "
            f"did not answer within ddp_timeout={wait_s} s. Look for the first error in the other processes' "
            f"output; the same command continues from the last checkpoint. ({str(error).splitlines()[0]})"
        ) from error


def gather_in_order(world: World, numbers: Sequence[int], items: Sequence[Any]) -> list[Any]:
    """All ranks' items in the order of their numbers."""
    everyone = world.gather_objects(list(zip(numbers, items, strict=True)))
    return [item for _, item in sorted(everyone, key=lambda pair: pair[0])]


def real_rows(accelerator: Any, batch_sizes: Sequence[int], num_rows: int) -> list[bool]:
    """Which rows of this rank's window belong to the data, which has `num_rows` per epoch.

    At the end of an epoch the loader fills the ranks' last batches with prompts from the epoch's beginning, so that all
    ranks have the same number; these have already been learned from and get no weight. (accelerate's own count,
    `remainder`, is -1 after a resume in the middle of an epoch.)
    """
    is_real = [True] * sum(batch_sizes)
    if accelerator.num_processes == 1 or not batch_sizes or not ends_epoch():
        return is_real
    last = batch_sizes[-1]
    own = num_rows % (last * accelerator.num_processes) or last * accelerator.num_processes
    first = accelerator.process_index * last  # rows of the data come first, in order of ranks
    return is_real[last:] + [first + i < own for i in range(last)]


def ends_epoch() -> bool:
    """Whether the window of rows just read is the last of its epoch."""
    return bool(GradientState().end_of_dataloader)


def weights_digest(tensors: Iterable[Tensor]) -> int:
    """A number that changes with any bit of a tensor: sums of the bit patterns, each times its place."""
    total = 0
    for place, tensor in enumerate(tensors):
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8 if tensor.element_size() == 1 else torch.int16)
        total += (2 * place + 1) * int(bits.sum(dtype=torch.int64))
    return total % (1 << 62)


def require_same_weights(model: nn.Module, anchor: Iterable[Tensor], world: World, *, step: int) -> None:
    """Raise WeightDesyncError unless policy and anchor are the same on all ranks.

    Sharded weights are not checked, since each part exists only once.
    """
    if world.is_alone:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    pairs: list[tuple[str, list[Tensor]]] = [("policy", list(trained)), ("anchor", list(anchor))]
    if any(is_sharded(tensor) for _, tensors in pairs for tensor in tensors):
        return
    ranks = world.gather(torch.tensor([[weights_digest(tensors) for _, tensors in pairs]]))
    for i, (what, _) in enumerate(pairs):
        values = ranks[:, i].tolist()
        if len(set(values)) > 1:
            others = [rank for rank, value in enumerate(values) if value != values[0]]
            raise WeightDesyncError(
                f"step {step}: the {what} of rank {others[0]} is not that of rank 0: the processes have drifted apart. "
                "The checkpoint of this step is not sealed; resume from the one before it."
            )
