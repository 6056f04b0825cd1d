"""`bondlm train` as two gloo processes, forked after the imports."""

import os
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from distributed.launch import free_port
from faults.children import start, wait


def train_as_two(config: Path, *, patience: float = 150) -> list[int | None]:
    """Exit codes of both processes; None: it was still running after `patience` seconds. Output as of `said`."""
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def prepare(rank: int) -> None:
        for state in (AcceleratorState, GradientState, PartialState):  # what other tests of this process have left
            state._shared_state.clear()
        os.environ.update(places | {"RANK": str(rank), "LOCAL_RANK": str(rank)})

    children = [start(config, lambda rank=rank: prepare(rank)) for rank in range(2)]
    return [wait(child, patience) for child in children]
