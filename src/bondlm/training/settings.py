"""The settings file of a run: written if no command does so, and compared when the run continues."""

import json
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from bondlm.config import ADAPTER, SETTINGS, changed_settings
from bondlm.data.fingerprints import reward_fingerprint
from bondlm.data.paths import found_in
from bondlm.runs.folder import BY_PYTHON, CONFIG_FILE, ENVIRONMENT_FILE, run_config, run_environment, write_whole
from bondlm.runs.redact import redacted

INPUTS = ("model", "reward_funcs", "train_dataset", "eval_dataset")
# Fields about an adapter's initialisation, which do not matter since its weights come from the checkpoint.
NOT_OF_ITS_WEIGHTS = (
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"),
    *("init_lora_weights", "init_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)


def as_on_file(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the form of config.yaml."""
    return dict(redacted({name: _plain(value) for name, value in settings.items() if name != "hub_token"}))


def fingerprints(reward_funcs: Any) -> list[dict[str, Any]]:
    """Fingerprints of a run's rewards: hashes of their files, sources or weights."""
    specs = [] if reward_funcs is None else reward_funcs
    return [reward_fingerprint(spec) for spec in (specs if isinstance(specs, list | tuple) else [specs])]


def edited_rewards(folder: Path, rewards: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each reward whose file, source or weights have changed since the run in `folder` was started."""
    known = run_environment(folder).get("rewards")
    before = {each.get("spec"): each.get("sha256") for each in known or [] if isinstance(each, dict)}
    now = {each["spec"]: each.get("sha256") for each in rewards}
    both = [spec for spec, digest in now.items() if digest and before.get(spec)]
    return [f"reward_funcs: {spec} has been edited" for spec in both if before[spec] != now[spec]]


def compare_settings(
    checkpoint: Path,
    settings: Mapping[str, Any] | None,
    adapter: PeftConfig | None,
    sources: Callable[[], list[dict[str, Any]]] = list,
    *,
    allowed: bool,
) -> list[str]:
    """The differences to the run that wrote a checkpoint: in its adapter, and in its `settings` unless these are None.

    With settings, also in its rewards, by their fingerprints (`sources`). Other inputs that are objects, then or now,
    have no name to compare.

    Raises:
        ConfigError: a difference is not `allowed`, see `changed_settings`.
        CheckpointError: the run's settings cannot be read.
    """
    source = checkpoint.resolve().parent
    before, now = _adapters(checkpoint, adapter)
    if settings is not None and (on_file := run_config(source)):
        before |= {name: value for name, value in on_file.items() if name in SETTINGS}
        now |= {name: value for name, value in settings.items() if name in SETTINGS}
        both = [name for name in ("model", "reward_funcs") if name in on_file and name in settings]  # data: by contents
        before |= {name: on_file[name] for name in both}
        now |= {name: settings[name] for name in both}
        spell_alike(before, now, source)
    edited = [] if settings is None else edited_rewards(source, sources())
    return changed_settings(before, now, source, allowed=allowed, edited=edited)


def spell_alike(before: Mapping[str, Any], now: dict[str, Any], source: Path) -> None:
    """Write names of inputs in `now` as those of the run in `source`, `before`, if they name the same files."""
    for name in INPUTS:
        if name in before and name in now:
            held = found_in(_directory(source), _listed(before[name]))
            if held == found_in(Path.cwd(), _listed(now[name])):
                now[name] = before[name]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _directory(source: Path) -> Path:
    """The directory that relative names in a run's settings refer to."""
    return Path(str(run_environment(source).get("directory") or Path.cwd())).absolute()


def _adapters(checkpoint: Path, adapter: PeftConfig | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that determine the weights of the checkpoint's adapter and of this one."""
    path = checkpoint / "adapter_config.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before, now = {"use_peft": bool(kept)}, {"use_peft": adapter is not None}
    given = {} if adapter is None else {name: _plain(value) for name, value in adapter.to_dict().items()}
    for name in sorted(kept.keys() & given.keys() - {*NOT_OF_ITS_WEIGHTS}):
        before[ADAPTER + name], now[ADAPTER + name] = _in_order(kept[name]), _in_order(given[name])
    return before, now


def _in_order(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


def write_settings(
    folder: Path,
    settings: Mapping[str, Any],
    sources: Callable[[], list[dict[str, Any]]],
    changes: Sequence[str],
    *,
    goes_on: bool,
) -> None:
    """Write the current settings, fingerprints of the rewards (`sources`), and the allowed `changes`.

    If the run `goes_on`, inputs that Python cannot name are kept; if a command began it, the paths of inputs are made
    absolute.
    """
    content = dict(settings)
    if goes_on and "directory" in run_environment(folder):
        content |= {name: found_in(Path.cwd(), content[name]) for name in INPUTS if name in content}
    if goes_on:
        content = {n: v for n, v in run_config(folder).items() if n not in SETTINGS and n not in content} | content
    write_whole(folder / CONFIG_FILE, BY_PYTHON + yaml.safe_dump(content, sort_keys=False))
    known = run_environment(folder) if goes_on else {}
    if changes or "rewards" not in known:
        rewards, before = sources(), known.get("config_changes", [])
        known |= {"rewards": rewards, "config_changes": [*before, *changes]}
        write_whole(folder / ENVIRONMENT_FILE, json.dumps(known, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """The value in YAML types, with objects replaced by their names."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return type(value).__name__ if " at 0x" in str(value) else str(value)  # the same in every process
