"""`bondlm train` as several gloo processes, forked after the imports."""

from pathlib import Path

from distributed.launch import free_port
from faults.children import as_rank, start, wait


def train_as(processes: int, config: Path, *, patience: float = 150) -> list[int | None]:
    """Exit codes of all processes; None: it was still running after `patience` seconds. Output as of `said`."""
    port = free_port()
    children = [start(config, lambda rank=rank: as_rank(rank, processes, port)) for rank in range(processes)]
    return [wait(child, patience) for child in children]


def train_as_two(config: Path) -> list[int | None]:
    """Exit codes of both processes."""
    return train_as(2, config)
