"""How far a run has come and why it stopped there, kept in its folder for who asks later."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from bondlm.errors import CheckpointError
from bondlm.runs.folder import write_whole

ENDING_FILE = "ending.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """Steps taken and planned; `reason` is one sentence if the run stopped before, or at, its last step by a goal.

    `target_n` and `kl_budget` are the goals that it had.
    """

    step: int
    max_steps: int
    reason: str | None = None
    target_n: float | None = None
    kl_budget: float | None = None


def write_ending(folder: Path, ending: Ending) -> None:
    """Write what `read_ending` reads."""
    write_whole(folder / ENDING_FILE, json.dumps(asdict(ending), indent=1) + "\n")


def read_ending(folder: Path) -> Ending | None:
    """The ending of a run folder; None if there is none: the run goes on, was killed, or is of bondlm 0.1.

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
    """For `eval.json`: the steps that were planned, and why the run stopped, where it has."""
    ending = read_ending(folder)
    if ending is None:
        return {}
    return {"planned_steps": ending.max_steps} | ({"stopped": ending.reason} if ending.reason else {})
