"""`bondlm eval`: which Best-of-N is one sample of a policy worth? Samples on file, `eval.json`, a table."""

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bondlm.cli.console import make_console
from bondlm.errors import ConfigError, DataError
from bondlm.runfolder import METRICS_FILE, locked

CONFIG_FILE = "config.yaml"
DEFAULTS = {"num_samples": 8, "num_reference_samples": 32, "max_completion_length": 256, "seed": 42, "max_rows": None}
# Options that a run folder answers with its own settings, under the names that they have there.
FROM_RUN = {
    "reference": "model",
    "dataset": "eval_dataset",
    **{name: name for name in ("reward_funcs", "reward_weights", "max_completion_length", "max_prompt_length")},
}
OBJECTIVE = ("n", "beta", "gamma", "anchor", "eta", "num_anchor_samples", "beta_rl", "alpha", "learning_rate")


def run(options: dict[str, Any]) -> int:
    """Draw what is not on file yet, then say what the samples show."""
    settings, run_config = complete(options)
    folder = Path(settings["output"])
    errors = make_console(stderr=True)
    with locked(folder):
        with errors.status("loading PyTorch, the models and the rewards"):
            job = _load(settings)
        result, policy, reference = _evaluate(folder, settings, job, errors)
        result |= _description(settings, run_config, job)
        from bondlm.evaluation.run import side_by_side, write_results
        from bondlm.evaluation.table import print_samples, print_table

        write_results(folder, result, policy, reference)
        console = make_console()
        print_samples(console, list(side_by_side(policy, reference)))
        print_table(console, result)
        console.print(f"written to {folder}", soft_wrap=True)
    return 0


def complete(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options with what a run folder or an adapter knows filled in, and the run's own config.

    Raises:
        ConfigError: a required option is missing or out of its range.
    """
    if not options.get("model"):
        raise ConfigError("model is required: set it in the config or with --model")
    model = Path(str(options["model"]))
    config = _run_config(model)
    known = {name: config[key] for name, key in FROM_RUN.items() if config.get(key) is not None}
    if "reference" not in known and _adapter_base(model) is not None:
        known["reference"] = _adapter_base(model)
    if "reward_funcs" not in options:
        _refuse_code_in(model, _list(known.get("reward_funcs")))
    if "reward_funcs" in options:
        known.pop("reward_weights", None)  # they were for the run's rewards
    settings = DEFAULTS | known | ({"output": str(model)} if config else {}) | dict(options)
    settings["model"] = str(model)
    for name in ("reference", "dataset", "reward_funcs", "output"):
        if not settings.get(name):
            raise ConfigError(
                f"{name} is required: {str(model)!r} is no run folder that says it. Set it in the config or with "
                f"--{name}"
            )
    for name, least in (("num_samples", 1), ("num_reference_samples", 2), ("max_completion_length", 1)):
        if not isinstance(settings[name], int) or settings[name] < least:
            raise ConfigError(f"{name}={settings[name]!r}: must be a whole number >= {least}")
    return settings, config


def _run_config(model: Path) -> dict[str, Any]:
    path = model / CONFIG_FILE
    if not path.is_file():
        return {}
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config if isinstance(config, dict) else {}


def _refuse_code_in(model: Path, rewards: list[Any]) -> None:
    """A run folder names its rewards, and naming a function runs it: never one that came with the folder."""
    for spec in map(str, rewards):
        source, _, name = spec.rpartition(":")
        if not name.isidentifier() or not source:
            continue
        places = [Path(source)] if source.endswith(".py") else [Path(p) / source.replace(".", "/") for p in sys.path]
        if any(place.resolve().is_relative_to(model.resolve()) for place in places):
            raise ConfigError(
                f"{model / CONFIG_FILE} names the reward {spec!r}, code that came with that folder: it is not run. "
                "Read it, and if you trust it give it on the command line with --reward_funcs"
            )


def _adapter_base(model: Path) -> str | None:
    path = model / "adapter_config.json"
    if not path.is_file():
        return None
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return None if base is None else str(base)


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _load(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Models, rewards and encoded prompts.

    Raises:
        ConfigError: policy and reference do not fit, or something cannot be loaded.
        DataError: prompts that cannot be used, or too few for an interval.
    """
    from transformers.utils import logging as transformers_logging

    from bondlm.evaluation.pair import Pair, laws
    from bondlm.evaluation.rouge import rouge_judge
    from bondlm.models import fast_dtype
    from bondlm.rewards import load_rewards

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    pair = Pair(
        settings["model"],
        str(settings["reference"]),
        dtype=str(settings.get("dtype", "auto")),
        max_rows=settings["max_rows"],
    )
    sampler = pair.samplers["policy"]
    rows = pair.rows(
        settings["dataset"],
        max_prompt_length=settings.get("max_prompt_length"),
        max_completion_length=settings["max_completion_length"],
    )
    if len(rows) < 2:
        raise DataError(f"{settings['dataset']}: {len(rows)} prompt, and an interval over prompts needs at least 2")
    specs, judge_specs = _list(settings["reward_funcs"]), _list(settings.get("judges"))
    weights = _list(settings.get("reward_weights")) or [1.0] * len(specs)
    if len(weights) != len(specs):
        raise ConfigError(f"reward_weights has {len(weights)} entries for {len(specs)} rewards: give one a reward")
    rewards = load_rewards(
        specs + judge_specs,
        weights + [0.0] * len(judge_specs),
        device=sampler.device,
        dtype=fast_dtype(sampler.device),
    )
    column = settings.get("reference_column")
    judges = [rouge_judge(rows, str(column))] if column is not None else []
    return {
        "pair": pair,
        "rows": rows,
        "rewards": rewards + judges,
        "num_judges": len(judge_specs) + len(judges),
        "laws": laws(settings["num_samples"], settings["num_reference_samples"]),
    }


def fingerprint(settings: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """All that the samples and their scores depend on."""
    from bondlm.evaluation.files import model_fingerprint, reward_fingerprint, rows_fingerprint

    samplers = job["pair"].samplers

    def model(role: str, name: str) -> dict[str, Any]:
        return model_fingerprint(name, getattr(samplers[role].model.config, "_commit_hash", None))

    names = ("num_samples", "num_reference_samples", "max_completion_length", "seed", "reference_column")
    return {
        "policy": model("policy", settings["model"]),
        "reference": model("reference", str(settings["reference"])),
        "dataset": rows_fingerprint(job["rows"]),
        "rewards": [reward_fingerprint(spec) for spec in _list(settings["reward_funcs"])],
        "reward_weights": [reward.weight for reward in job["rewards"]],
        "judges": [reward_fingerprint(spec) for spec in _list(settings.get("judges"))],
        "dtype": str(samplers["policy"].model.dtype),
        **{name: settings.get(name) for name in names},
    }


def _evaluate(
    folder: Path, settings: Mapping[str, Any], job: Mapping[str, Any], console: Console
) -> tuple[dict[str, Any], Any, Any]:
    from bondlm.evaluation.files import claim, read_samples
    from bondlm.evaluation.pair import fill
    from bondlm.evaluation.samples import from_rows
    from bondlm.evaluation.statistics import summarize

    claim(folder, fingerprint(settings, job), [law.file for law in job["laws"]])
    total = len(job["rows"])
    with _progress(console) as progress:
        for number, law in enumerate(job["laws"]):
            fill(
                folder / law.file,
                law,
                job["pair"],
                job["rows"],
                job["rewards"],
                number=number,
                num_judges=job["num_judges"],
                seed=int(settings["seed"]),
                max_completion_length=settings["max_completion_length"],
                on_prompts_done=_Counter(progress, console, f"{law.name} x {law.num_samples}", total),
            )
    scored = {law.name: from_rows(read_samples(folder / law.file), law.num_samples) for law in job["laws"]}
    policy, reference = scored.pop("policy"), scored.pop("reference")
    with console.status("statistics"):
        return summarize(policy, reference, scored), policy, reference


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True)


class _Counter:
    """A bar on a terminal, a line for each chunk elsewhere."""

    def __init__(self, progress: Progress, console: Console, name: str, total: int) -> None:
        self._progress, self._console, self._name, self._total, self._done = progress, console, name, total, 0
        self._task = progress.add_task(name, total=total)

    def __call__(self, more: int) -> None:
        self._done += more
        self._progress.update(self._task, completed=self._done)
        if more and (self._done == self._total or not self._console.is_terminal):
            self._console.print(f"{self._name}: {self._done}/{self._total} prompts", highlight=False, soft_wrap=True)


def _description(settings: Mapping[str, Any], config: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    rewards, num_judges = job["rewards"], job["num_judges"]
    objective = {"name": config.get("objective", "jbond")} | {k: config[k] for k in OBJECTIVE if k in config}
    return {
        "steps": _last_step(Path(settings["model"]) / METRICS_FILE),
        "objective": objective if config else None,
        "rewards": [reward.name for reward in rewards[: len(rewards) - num_judges]],
        "model": settings["model"],
        "reference": str(settings["reference"]),
    }


def _last_step(path: Path) -> int | None:
    if not path.is_file():
        return None
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    try:
        return int(json.loads(lines[-1])["step"])
    except (IndexError, ValueError, KeyError, TypeError):
        return None
