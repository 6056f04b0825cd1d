"""How a run's prompts are rendered, stored in its folder so that later commands produce the same tokens."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from bondlm.errors import CheckpointError
from bondlm.runs.folder import write_whole

PROMPTING_FILE = "prompting.json"


def read_prompting(folder: Path) -> dict[str, Any] | None:
    """`prompt_format`, `chat_template_kwargs` and `now` of a run folder; None if it has no such file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / PROMPTING_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            "prompt_format": str(found["prompt_format"]),
            "chat_template_kwargs": dict(found["chat_template_kwargs"]),
            "now": datetime.fromisoformat(found["now"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say how the run's prompts are rendered ({error!r}): restore it, or start a new run in "
            "another output_dir"
        ) from error


def write_prompting(folder: Path, prompt_format: str, variables: Mapping[str, Any], now: datetime) -> None:
    """Write the file that `read_prompting` reads."""
    content = {"prompt_format": prompt_format, "chat_template_kwargs": dict(variables), "now": now.isoformat()}
    write_whole(folder / PROMPTING_FILE, json.dumps(content, indent=1) + "\n")


def adopt_prompting(source: Path, folder: Path) -> None:
    """Continue in `folder` with the rendering of the run in `source`."""
    if folder.resolve() != source.resolve() and (before := read_prompting(source)) is not None:
        write_prompting(folder, before["prompt_format"], before["chat_template_kwargs"], before["now"])
