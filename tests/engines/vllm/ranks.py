"""`bondlm train` as two gloo processes, forked after the imports."""

from pathlib import Path

from distributed.launch import free_port
from faults.children import as_rank, start, wait


def train_as_two(config: Path, *, patience: float = 150) -> list[int | None]:
    """Exit codes of both processes; None: it was still running after `patience` seconds. Output as of `said`."""
    port = free_port()
    children = [start(config, lambda rank=rank: as_rank(rank, 2, port)) for rank in range(2)]
    return [wait(child, patience) for child in children]
