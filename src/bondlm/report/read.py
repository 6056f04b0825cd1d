"""The parts of a run folder that a report uses: evaluation, log, samples, settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bondlm.errors import ConfigError, DataError
from bondlm.report.shapes import ANSWER_SHAPE, EVAL_SHAPE, REQUIRED, SAMPLE_SHAPE, check_shape
from bondlm.runs.folder import EVAL_FILE, EVAL_SAMPLES_FILE, METRICS_FILE, plain, run_config, run_of, weights_file
from bondlm.runs.redact import redacted


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt with the three answers that the page shows; a reward that is not finite is None."""

    prompt: str
    reference: tuple[str, float | None]
    best_of_n: tuple[str, float | None]
    policy: tuple[str, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The contents of one run folder."""

    name: str
    folder: Path
    result: Mapping[str, Any]
    """eval.json."""
    steps: Sequence[Mapping[str, Any]]
    """Rows of metrics.jsonl that a training step logged."""
    evaluations: Sequence[Mapping[str, Any]]
    """Rows of metrics.jsonl that an evaluation logged."""
    samples: Sequence[Sample]
    best_of: str
    """What the samples' best-of-n column is called, e.g. "Best-of-8"."""
    config: str


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, each with a name: the folder's own if that is unique, otherwise the whole path.

    Raises:
        ConfigError: there is no folder, the same one twice, or one without an evaluation.
        DataError: a file that is not what it should be.
        CheckpointError: a run's config.yaml cannot be read.
    """
    if not folders:
        raise ConfigError("no run folder is given: write `bondlm report RUN`, e.g. `bondlm report runs/everyday`")
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise ConfigError(f"{str(folder)!r} is given twice: name each run folder once")
    short = [folder.name for folder in resolved]
    return [
        read_run(folder, name if short.count(name) == 1 else str(folder))
        for folder, name in zip(folders, short, strict=True)
    ]


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder; raises as `read_runs`."""
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is not a folder: name a run folder, as `bondlm train` leaves it")
    path = folder / EVAL_FILE
    if not path.is_file():
        if (run := run_of(folder)) != folder:
            raise ConfigError(f"{str(folder)!r} is a checkpoint: name the run folder around it, {str(run)!r}")
        logged, todo = (folder / METRICS_FILE).is_file(), "make a run with `bondlm train`, or run `bondlm eval`"
        if logged:
            todo = "run `bondlm eval` on it first"
        if logged and weights_file(folder) is None:
            todo = "its run was stopped, is still running, or has not saved its model; the same command continues it"
        raise ConfigError(f"{str(folder)!r} has no {EVAL_FILE}{'' if logged else f' and no {METRICS_FILE}'}: {todo}")
    logs = _read_jsonl(folder / METRICS_FILE)
    samples, best_of = _read_samples(folder / EVAL_SAMPLES_FILE)
    config = redacted(run_config(folder))  # a page is shared more freely than a run folder
    return Run(
        name=name,
        folder=folder,
        result=_read_result(path),
        steps=[row for row in logs if "loss" in row],
        evaluations=[row for row in logs if "eval_effective_n" in row],
        samples=samples,
        best_of=best_of,
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_result(path: Path) -> Mapping[str, Any]:
    try:
        result = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): run `bondlm eval` again to rewrite it") from error
    check_shape(result, EVAL_SHAPE, str(path))
    missing = [name for name in REQUIRED if name not in result]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: run `bondlm eval` again to rewrite it")
    histogram = result.get("quantile_histogram", {})
    if histogram and len(histogram.get("edges", ())) != len(histogram.get("policy", ())) + 1:
        raise DataError(f"{path}.quantile_histogram needs one edge more than shares: run `bondlm eval` again")
    checked: Mapping[str, Any] = plain(result)
    return checked


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line without a line end is still being written, and is left out."""
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = plain(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}): remove the line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is not a JSON object: remove the line")
        rows.append(row)
    return rows


def _read_samples(path: Path) -> tuple[list[Sample], str]:
    """The samples to compare, and the name of the reference's best-of-n."""
    rows = _read_jsonl(path)
    prefix = "reference_best_of_"
    best = next((key for key in (rows[0] if rows else {}) if key.startswith(prefix)), "")
    samples = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, line {number}"
        check_shape(row, SAMPLE_SHAPE | dict.fromkeys(("reference", "policy", best), ANSWER_SHAPE), where)
        answers = {
            key: (str(row.get(key, {}).get("text", "")), row.get(key, {}).get("reward"))
            for key in ("reference", best, "policy")
        }
        samples.append(
            Sample(
                prompt=str(row.get("prompt", "")),
                reference=answers["reference"],
                best_of_n=answers[best],
                policy=answers["policy"],
            )
        )
    return samples, f"Best-of-{best.removeprefix(prefix)}" if best else ""
