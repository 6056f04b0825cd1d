"""How a command renders prompts: according to its options, otherwise as in the training of the given run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bondlm.errors import ConfigError
from bondlm.runs.folder import run_of
from bondlm.runs.prompting import read_prompting


def rendering_of(options: Mapping[str, Any], *, run: Path | None = None, takes_rendered: bool = True) -> Any:
    """The `Rendering` that the options ask for.

    Args:
        options: `prompt_format` and `chat_template_kwargs`, if they are set.
        run: the model's folder, possibly of a run or a checkpoint; its training rendering is the default.
        takes_rendered: whether to adopt "rendered" from a run: right for its data, but not for a question.

    Raises:
        ConfigError: an option has an invalid value.
    """
    from bondlm.data.rendering import FORMATS, Rendering

    run = None if run is None else run_of(run)
    known = (read_prompting(run) if run is not None else None) or {}
    if known.get("prompt_format") == "rendered" and not takes_rendered:
        del known["prompt_format"]
    asked = {name: options[name] for name in ("prompt_format", "chat_template_kwargs") if options.get(name) is not None}
    settings = known | asked
    prompt_format, variables = settings.get("prompt_format", "auto"), settings.get("chat_template_kwargs", {})
    if prompt_format not in FORMATS:
        raise ConfigError(f"prompt_format={prompt_format!r}: must be one of {', '.join(FORMATS)}")
    if not isinstance(variables, Mapping):
        raise ConfigError(f"chat_template_kwargs={variables!r}: names and values are needed, {{name: value}}")
    return Rendering(prompt_format=prompt_format, variables=variables, now=settings.get("now"))
