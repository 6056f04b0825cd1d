"""How far a run has come and why it stopped, stored in its folder for later commands."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bondlm.errors import CheckpointError
from bondlm.runs.folder import write_whole

ENDING_FILE = "ending.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """Steps taken and planned; `reason` is one sentence if a goal stopped the run.

    `target_n` and `kl_budget` are the run's goals. `best_step` is the step whose weights were restored at the end by
    `load_best_model_at_end`; None if the last step's were kept.
    """

    step: int
    max_steps: int
    reason: str | None = None
    target_n: float | None = None
    kl_budget: float | None = None
    best_step: int | None = None
    is_interrupted: bool = False  # by a signal or a fault


def best_step(args: Any, state: Any) -> int | None:
    """The step whose weights Trainer restored at the end of the run (`load_best_model_at_end`), if any."""
    restored = state.best_model_checkpoint if args.load_best_model_at_end else None
    return None if restored is None else int(str(restored).rpartition("-")[2])


def write_ending(folder: Path, ending: Ending) -> None:
    """Write the file that `read_ending` reads."""
    write_whole(folder / ENDING_FILE, json.dumps(asdict(ending), indent=1) + "\n")


def read_ending(folder: Path) -> Ending | None:
    """The ending of a run folder; None if there is none: the run is still active or was killed.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / ENDING_FILE
    if not path.is_file():
        return None
    try:
        return Ending(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it, then the same command continues") from error


def describe_ending(folder: Path) -> dict[str, object]:
    """For `eval.json`: the planned steps, why the run stopped, and its last step if earlier weights are kept."""
    ending = read_ending(folder)
    if ending is None:
        return {}
    found: dict[str, object] = {"planned_steps": ending.max_steps}
    found |= {"stopped": ending.reason} if ending.reason else {}
    return found | ({"last_step": ending.step} if ending.best_step is not None else {})


def step_of_weights(folder: Path, last: int | None) -> int | None:
    """The step whose weights a run folder holds; `last` is its last logged step.

    None where a signal or a fault stopped the run: its steps are in the checkpoint, and weights next to it are of an
    earlier end.
    """
    ending = read_ending(folder)
    if ending is None:
        return last
    return None if ending.is_interrupted else last if ending.best_step is None else ending.best_step
