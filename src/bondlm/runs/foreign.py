"""Users' own files that are in the way of a run."""

from pathlib import Path

from bondlm.runs.ending import ENDING_FILE
from bondlm.runs.folder import (
    BY_PYTHON,
    CONFIG_FILE,
    DROPPED_FILE,
    ENVIRONMENT_FILE,
    EVAL_FILE,
    EVAL_SAMPLES_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    SKIPPED_FILE,
    run_environment,
)
from bondlm.runs.manifest import SEALED_FILE
from bondlm.runs.prompting import PROMPTING_FILE

WRITTEN = (
    *(CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, SAMPLES_FILE, DROPPED_FILE, SKIPPED_FILE, ENDING_FILE),
    *(EVAL_FILE, EVAL_SAMPLES_FILE, "README.md", "report.html", "report.json"),
)


def foreign_file(folder: Path) -> str | None:
    """The name of a file that a run would replace or append to, in a folder without a run; None if there is none."""
    return None if _was_a_run(folder) else next((name for name in WRITTEN if (folder / name).exists()), None)


def _was_a_run(folder: Path) -> bool:
    """Whether a run was begun there: each leaves its prompting.json, one of bondlm 0.1 one of the other signs."""
    if (folder / PROMPTING_FILE).exists() or (folder / SEALED_FILE).exists() or any(folder.glob("checkpoint-*")):
        return True
    config = folder / CONFIG_FILE
    if config.is_file() and config.read_bytes().startswith(BY_PYTHON.encode()):
        return True
    versions = run_environment(folder).get("versions")
    return isinstance(versions, dict) and "bondlm" in versions
