"""Scored samples on file, as `bondlm score` writes them: what an objective that draws nothing itself learns from.

A row is `{"prompt", "completion", "reward"}`, one sample; `"finished": false` says that it was cut at its budget. Rows
of the same prompt belong together, wherever they stand.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from bondlm.config import OFF_POLICY, BONDConfig, objective_of
from bondlm.data.columns import LOGGED_IDS, LOGGED_REWARDS, TEMPLATE_VARIABLES, TOOLS
from bondlm.data.fingerprints import model_fingerprint, reward_fingerprint, same_model
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.errors import ConfigError, DataError, listed

_BESIDE = (TOOLS, TEMPLATE_VARIABLES)  # two prompts are the same if the template makes the same of them


def is_scored(dataset: Dataset) -> bool:
    """Whether the rows are scored samples."""
    return {"prompt", "completion", "reward"} <= set(dataset.column_names)


def check_inputs(
    args: BONDConfig, prompts: Dataset | None, source: Any, model: str, reward_funcs: Any, *, has_held_out: bool
) -> None:
    """Refuse what the settings and the data say alone, before a model is loaded.

    Args:
        args: the run's settings.
        prompts: the training data.
        source: where they came from; a file of scored samples may have its origin beside it.
        model: the policy's name.
        reward_funcs: None, or what the trainer was given.
        has_held_out: whether there are held-out prompts.

    Raises:
        ConfigError: something is missing or contradicts the data: rewards, held-out prompts, objective, anchor, model.
        DataError: scored samples with rewards missing or not finite, or with too few samples of a prompt.
    """
    if args.eval_strategy != "no" and not has_held_out:
        raise ConfigError(
            f"eval_strategy={str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r} (target_n="
            f"{args.target_n}, kl_budget={args.kl_budget}) without eval_dataset: give one, or set eval_strategy='no'"
        )
    if has_held_out and reward_funcs is None:
        raise ConfigError("eval_dataset needs reward_funcs: an evaluation draws and scores new samples")
    if prompts is not None and is_scored(prompts):
        _check_settings(args)
        if isinstance(source, str | Path):
            _check_origin(Path(source), model, reward_funcs, args)
        _check_scored(prompts, args)
    elif prompts is not None and reward_funcs is None:
        raise ConfigError("reward_funcs is required: only a data set of scored samples comes without")


def samples_per_prompt(dataset: Dataset | None) -> int | None:
    """How many scored samples every prompt has at least; None if the rows are no scored samples."""
    if dataset is None or not is_scored(dataset):
        return None
    return min(Counter(_key(row) for row in _rows(dataset)).values())


def group_scored(dataset: Dataset, encoder: PromptEncoder, num_samples: int) -> Dataset:
    """One row per prompt, with its first `num_samples` scored samples (see `check_inputs`).

    Args:
        dataset: rows of `bondlm score`.
        encoder: the policy's. Text is encoded again here: log files hold no token ids. What ends an answer is put
            behind every completion that is not marked `finished: false`.
        num_samples: what the objective asks for.

    Returns:
        Columns `prompt`, `logged_ids`, `logged_rewards`, and those that the chat template looks at.

    Raises:
        DataError: completions that are empty or too long.
    """
    problems: list[str] = []
    groups: dict[str, tuple[dict[str, Any], list[tuple[list[int], float]]]] = {}
    for i, row in enumerate(_rows(dataset)):
        (ids,) = encoder.encode_answers([row["completion"]], [row["prompt"]])
        ids = ids[:-1] if row.get("finished") is False else ids
        if not 1 <= len(ids) <= encoder.max_completion_length:
            problems.append(
                f"row {i}: the completion has {len(ids)} tokens (prompt {_short(row['prompt'])}); "
                f"max_completion_length is {encoder.max_completion_length}, raise it"
            )
            continue
        groups.setdefault(_key(row), (row, []))[1].append((ids, float(row["reward"])))
    _raise_if_any(problems)
    columns = [name for name in ("prompt", *_BESIDE) if name in dataset.column_names]
    return Dataset.from_dict(
        {
            **{name: [row[name] for row, _ in groups.values()] for name in columns},
            LOGGED_IDS: [[ids for ids, _ in samples[:num_samples]] for _, samples in groups.values()],
            LOGGED_REWARDS: [[reward for _, reward in samples[:num_samples]] for _, samples in groups.values()],
        }
    )


def origin_file(path: Path) -> Path:
    """Where `bondlm score` notes what a file of scored samples was made from."""
    return path.with_name(f"{path.name}.meta.json")


def _check_origin(path: Path, model: str, reward_funcs: Any, args: BONDConfig) -> None:
    """Compare with the model that drew the samples, and the rewards that scored them, where the file says it."""
    beside = origin_file(path)
    if not beside.is_file():
        return
    try:
        origin = json.loads(beside.read_text(encoding="utf-8"))
        drawn_by, scored_by = dict(origin["model"]), list(origin["rewards"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{beside} does not say what {path.name} was made from ({error!r}): remove it") from error
    if not same_model(drawn_by, mine := model_fingerprint(model, None)):
        text = (
            f"model={model!r}: the samples of {str(path)!r} were drawn by another one, {drawn_by.get('name')!r} "
            f"({_hash(drawn_by)} against {_hash(mine)})"
        )
        if objective_of(args).plan.compare:  # plain fine-tuning may well learn from another model's answers
            raise ConfigError(
                f"{text}: {args.objective} compares with the model that drew them. Train that one, or score again"
            )
        warnings.warn(f"bondlm: {text}: the result will not be Best-of-n of this model", stacklevel=4)
    specs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    if all(isinstance(spec, str) for spec in specs) and [reward_fingerprint(spec) for spec in specs] != scored_by:
        warnings.warn(
            f"bondlm: reward_funcs={specs!r} measure the result, but other rewards scored the samples of {str(path)!r} "
            f"({', '.join(str(reward.get('spec')) for reward in scored_by)})",
            stacklevel=4,
        )


def _hash(fingerprint: Mapping[str, Any]) -> str:
    return f"sha256 {str(fingerprint['sha256'])[:12]}" if "sha256" in fingerprint else str(fingerprint.get("name"))


def _rows(dataset: Dataset) -> Dataset:
    columns = [c for c in ("prompt", "completion", "reward", "finished", *_BESIDE) if c in dataset.column_names]
    return dataset.select_columns(columns)


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["prompt"], *(row.get(name) for name in _BESIDE)], sort_keys=True)


def _least(args: BONDConfig) -> int:
    """How many scored samples a prompt must have."""
    return max(args.n, args.num_samples or 0)


def _check_scored(dataset: Dataset, args: BONDConfig) -> None:
    least = _least(args)
    problems: list[str] = []
    groups: dict[str, tuple[int, Any, int]] = {}
    for i, row in enumerate(_rows(dataset)):
        problem = _problem(row)
        if problem is not None:
            problems.append(f"row {i}: {problem}")
            continue
        first, prompt, count = groups.get(_key(row), (i, row["prompt"], 0))
        groups[_key(row)] = (first, prompt, count + 1)
    problems += [
        f"row {i}: the prompt {_short(prompt)} has {count} scored samples, {least} are needed: score more, lower n, "
        "or remove the prompt"
        for i, prompt, count in groups.values()
        if count < least
    ]
    _raise_if_any(problems)


def _check_settings(args: BONDConfig) -> None:
    if args.objective not in OFF_POLICY:
        raise ConfigError(
            f"train_dataset holds scored samples (columns completion and reward), but objective={args.objective!r} "
            f"draws its own: choose {', '.join(OFF_POLICY)}, or remove these columns"
        )
    if args.missing_eos != "keep":
        raise ConfigError(
            f"missing_eos={args.missing_eos!r}: it looks at samples that the run draws, and these are scored already. "
            "Remove it; the rows of `bondlm score` say which samples are `finished`"
        )
    if args.truncate_prompt != "never":
        raise ConfigError(
            f"truncate_prompt={args.truncate_prompt!r}: the samples were drawn for whole prompts. Remove it, or the "
            "prompts that are too long"
        )
    if args.anchor != "fixed":
        raise ConfigError(
            f"anchor={args.anchor!r}: scored samples were drawn from the model as it was, set anchor='fixed'"
        )


def _problem(row: dict[str, Any]) -> str | None:
    reward = row["reward"]
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        return f"the reward is {reward!r}, not a finite number (prompt {_short(row['prompt'])}): score the sample again"
    if not isinstance(row["completion"], str):
        return f"the completion is {row['completion']!r}, not text (prompt {_short(row['prompt'])})"
    return None


def _short(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _raise_if_any(problems: Sequence[str]) -> None:
    if problems:
        raise DataError(listed(problems, "bad rows"))
