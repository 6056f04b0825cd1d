"""The origin of a file of scored samples: `bondlm score` writes it next to the file, and training checks it."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bondlm.config import BONDConfig, objective_of
from bondlm.data.chat_templates import pinned
from bondlm.data.files import files_of
from bondlm.data.fingerprints import model_fingerprint, reward_fingerprint, same_model
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.rendering import Rendering
from bondlm.errors import ConfigError, DataError
from bondlm.runs.redact import redacted


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model that drew a file's samples, the rewards that scored them, and the rendering of prompts, if known."""

    path: str
    model: Mapping[str, Any]
    rewards: list[Any]
    rendering: Rendering | None = None


def origin_file(path: Path) -> Path:
    """The file in which `bondlm score` stores the origin of a file of scored samples."""
    return path.with_name(f"{path.name}.meta.json")


def prompting_of(rendering: Rendering) -> dict[str, Any]:
    """The rendering of prompts, in the form that `bondlm score` stores."""
    now = None if rendering.now is None else rendering.now.isoformat()
    return {"prompt_format": rendering.prompt_format, "chat_template_kwargs": dict(rendering.variables), "now": now}


def origins_of(source: Any) -> list[Origin]:
    """The origins of the source's files, as far as they are stored.

    Raises:
        DataError: a stored origin cannot be read.
    """
    found = []
    for path in files_of(source) or ():
        file = origin_file(Path(path))
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            model, rewards = dict(content["model"]), list(content["rewards"])
            rendering = _rendering(content["prompting"]) if "prompting" in content else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} does not say what {path} was made from ({error!r}): remove it") from error
        found.append(Origin(path=path, model=model, rewards=rewards, rendering=rendering))
    return found


def check_origin(origin: Origin, model: str, reward_funcs: Any, args: BONDConfig) -> None:
    """Compare the run with the model that drew the samples, and the rewards that scored them.

    Raises:
        ConfigError: another model drew them, and the objective compares with the one that did.
    """
    if not same_model(origin.model, mine := model_fingerprint(model, None)):
        text = (
            f"model={model!r}: the samples of {origin.path!r} were drawn by a different model, "
            f"{origin.model.get('name')!r} ({_hash(origin.model)} against {_hash(mine)})"
        )
        if objective_of(args).plan.compare:  # plain fine-tuning may learn from another model's answers
            raise ConfigError(
                f"{text}: {args.objective} compares with the model that drew them. Train that one, or score again"
            )
        warnings.warn(f"bondlm: {text}: the result will not be Best-of-n of this model", stacklevel=4)
    specs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    if all(isinstance(spec, str) for spec in specs) and [reward_fingerprint(spec) for spec in specs] != origin.rewards:
        warnings.warn(
            f"bondlm: reward_funcs={redacted(specs, is_name=True)!r} measure the result, but other rewards scored the "
            f"samples of {origin.path!r} ({', '.join(str(reward.get('spec')) for reward in origin.rewards)})",
            stacklevel=4,
        )


def time_of(origins: Sequence[Origin]) -> datetime | None:
    """The time that templates were told when the samples were drawn, from the first file that has it."""
    known = (origin.rendering.now for origin in origins if origin.rendering is not None)
    return next((now for now in known if now is not None), None)


def check_rendering(origins: Sequence[Origin], encoder: PromptEncoder, prompt: Any) -> None:
    """Check that samples are learned after the same rendered prompts as when they were drawn; `prompt` is one of these.

    Raises:
        ConfigError: a setting or the date would give them different tokens.
    """
    mine = encoder.rendering
    for origin in origins:
        then = origin.rendering
        if then is None:
            continue
        if then.kind_of(prompt, encoder.tokenizer) != mine.kind_of(prompt, encoder.tokenizer):
            raise ConfigError(
                f"prompt_format={mine.prompt_format!r}: the samples of {origin.path!r} were drawn with "
                f"prompt_format={then.prompt_format!r}, set it so"
            )
        if dict(then.variables) != dict(mine.variables):
            raise ConfigError(
                f"chat_template_kwargs={dict(mine.variables)!r}: the samples of {origin.path!r} were drawn with "
                f"{dict(then.variables)!r}, set it so"
            )
        template = str(getattr(encoder.tokenizer, "chat_template", None) or "")
        if pinned(template, then.now) != pinned(template, mine.now):
            raise ConfigError(
                f"the chat template writes the date, but the samples of {origin.path!r} were drawn on "
                f"{then.now:%Y-%m-%d}, not on {mine.now:%Y-%m-%d}: learn from files of one day, in a new output_dir"
            )


def _rendering(content: Mapping[str, Any]) -> Rendering:
    return Rendering(
        prompt_format=str(content["prompt_format"]),
        variables=dict(content["chat_template_kwargs"]),
        now=None if content["now"] is None else datetime.fromisoformat(content["now"]),
    )


def _hash(fingerprint: Mapping[str, Any]) -> str:
    return f"sha256 {str(fingerprint['sha256'])[:12]}" if "sha256" in fingerprint else str(fingerprint.get("name"))
