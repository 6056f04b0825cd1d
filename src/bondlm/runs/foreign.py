"""Users' own files that are in the way of a run."""

from pathlib import Path

from bondlm.runs.ending import ENDING_FILE
from bondlm.runs.folder import (
    CONFIG_FILE,
    DROPPED_FILE,
    ENVIRONMENT_FILE,
    EVAL_FILE,
    EVAL_SAMPLES_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    SKIPPED_FILE,
)
from bondlm.runs.manifest import was_a_run

WRITTEN = (
    *(CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, SAMPLES_FILE, DROPPED_FILE, SKIPPED_FILE, ENDING_FILE),
    *(EVAL_FILE, EVAL_SAMPLES_FILE, "README.md", "report.html", "report.json"),
)


def foreign_file(folder: Path) -> str | None:
    """The name of a file that a run would replace or append to, in a folder without a run; None if there is none."""
    return None if was_a_run(folder) else next((name for name in WRITTEN if (folder / name).exists()), None)
