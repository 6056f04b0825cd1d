"""Reload the model that a run was started from: the reference, or the base of an adapter."""

import json
from pathlib import Path
from typing import Any

from bondlm.errors import ConfigError
from bondlm.runs.folder import run_config, run_of


def adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's config of an adapter; empty if the folder has no adapter.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Save the adapter again") from error
    return content if isinstance(content, dict) else {}


def start_kwargs(folder: Path) -> dict[str, Any]:
    """Keyword arguments for the model that the run or adapter in `folder` was trained from."""
    from bondlm.config.model_kwargs import lasting_kwargs

    revision = adapter_config(folder).get("revision")
    known = {} if revision is None else {"revision": revision}
    return known | lasting_kwargs(run_config(run_of(folder)).get("model_init_kwargs"))


def load_kwargs(model: str) -> dict[str, Any]:
    """Keyword arguments for a model by name: an adapter's base is loaded as in its training, others by default."""
    return start_kwargs(Path(model)) if adapter_config(Path(model)) else {}
