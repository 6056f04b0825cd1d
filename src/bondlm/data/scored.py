"""Scored samples in files, as `bondlm score` writes them, for objectives that draw no samples themselves.

A row is `{"prompt", "completion", "reward"}`, one sample; `"finished": false` says that it was truncated, and
`token_ids` are its tokens. Rows of the same prompt belong together, wherever they are.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from bondlm.config import OFF_POLICY, BONDConfig, objective_of
from bondlm.data.columns import DRAWN_IDS, LOGGED_IDS, LOGGED_REWARDS, TEMPLATE_VARIABLES, TOOLS
from bondlm.data.origin import Origin, check_origin
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.rows import raise_or_note
from bondlm.errors import ConfigError, DataError, listed

_log = logging.getLogger(__name__)

_BESIDE = (TOOLS, TEMPLATE_VARIABLES)  # two prompts are the same if the template renders them the same


def is_scored(dataset: Dataset) -> bool:
    """Whether the rows are scored samples."""
    return {"prompt", "completion", "reward"} <= set(dataset.column_names)


def check_inputs(
    args: BONDConfig,
    prompts: Dataset | None,
    origins: Sequence[Origin],
    model: str,
    reward_funcs: Any,
    *,
    has_prompts: bool,
    has_held_out: bool,
) -> None:
    """Refuse problems that settings and data show before a model is loaded.

    Args:
        args: the run's settings.
        prompts: the training data, if they are read as a whole.
        origins: the origins of its files, if these are scored samples with a stored origin.
        model: the policy's name.
        reward_funcs: the trainer's argument, or None.
        has_prompts: whether there are training data, streamed or not.
        has_held_out: whether there are held-out prompts.

    Raises:
        ConfigError: something is missing or contradicts the data: rewards, held-out prompts, objective, anchor, model.
    """
    if args.eval_strategy != "no" and not has_held_out:
        raise ConfigError(
            f"eval_strategy={str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r} (target_n="
            f"{args.target_n}, kl_budget={args.kl_budget}) without eval_dataset: give one, or set eval_strategy='no'"
        )
    if has_held_out and reward_funcs is None:
        raise ConfigError("eval_dataset needs reward_funcs: an evaluation draws and scores new samples")
    if prompts is not None and is_scored(prompts):
        _settle(args)
        for origin in origins:
            check_origin(origin, model, reward_funcs, args)
    elif has_prompts and reward_funcs is None:
        raise ConfigError("reward_funcs is required: only a data set of scored samples comes without")


def samples_per_prompt(dataset: Dataset | None) -> int | None:
    """The minimum number of scored samples per prompt, grouped or not; None if the rows are not scored samples."""
    if dataset is not None and LOGGED_IDS in dataset.column_names:
        return min(map(len, dataset[LOGGED_IDS]))
    if dataset is None or not is_scored(dataset):
        return None
    return min(Counter(_key(row) for row in _rows(dataset)).values())


def usable_scored(dataset: Dataset, args: BONDConfig, places: list[str], skipped: list[str] | None = None) -> Dataset:
    """The scored samples without bad ones, and without prompts that have too few.

    `places` has the place of each row, and is reduced to the remaining rows.

    Raises:
        DataError: there are bad rows, and `skipped` is not given to take their reasons.
    """
    bad: dict[int, str] = {}
    groups: dict[str, list[int]] = {}
    prompts: dict[str, Any] = {}
    for i, row in enumerate(_rows(dataset)):
        if (problem := _problem(row)) is not None:
            bad[i] = problem
            continue
        groups.setdefault(key := _key(row), []).append(i)
        prompts.setdefault(key, row["prompt"])
    _leave_out_short(groups, prompts, _least(args), bad, each=skipped is not None)
    problems = [f"{places[i]}: {reason}" for i, reason in bad.items()]
    raise_or_note(problems, skipped)
    good = sorted(i for rows in groups.values() for i in rows if i not in bad)
    if not good:
        _refuse_all(problems)
    places[:] = [places[i] for i in good]
    return dataset.select(good) if bad else dataset


def group_scored(
    dataset: Dataset,
    encoder: PromptEncoder,
    args: BONDConfig,
    places: list[str],
    skipped: list[str] | None = None,
) -> Dataset:
    """One row per prompt, with its first scored samples, as many as the objective takes (see `usable_scored`).

    Args:
        dataset: rows of `bondlm score`.
        encoder: the policy's encoder. Samples with `token_ids` are learned as they were drawn. Text is encoded again,
            and an end token is appended to each answer that is not marked `finished: false`.
        args: the run's settings.
        places: the place of each row, for messages; afterwards, that of the first sample of each prompt.
        skipped: takes the reason for each unusable sample, and for each prompt that then has too few.

    Returns:
        Columns `prompt`, `logged_ids`, `logged_rewards`, and those that the chat template uses.

    Raises:
        DataError: completions that are empty or too long, or hold a token at which the model stops.
    """
    bad: dict[int, str] = {}
    groups: dict[str, list[int]] = {}
    first: dict[str, dict[str, Any]] = {}
    ids_of = _ids_of_samples(dataset, encoder, places)
    for i, row in enumerate(_rows(dataset)):
        if 1 <= len(ids_of[i]) <= encoder.max_completion_length:
            groups.setdefault(key := _key(row), []).append(i)
            first.setdefault(key, row)
        else:
            bad[i] = (
                f"the completion has {len(ids_of[i])} tokens (prompt {_short(row['prompt'])}); "
                f"max_completion_length is {encoder.max_completion_length}, raise it"
            )
    if skipped is not None:
        _leave_out_short(groups, {key: row["prompt"] for key, row in first.items()}, _least(args), bad, each=True)
    problems = [f"{places[i]}: {reason}" for i, reason in bad.items()]
    raise_or_note(problems, skipped)
    kept = {key: rows for key, rows in groups.items() if rows[0] not in bad}
    if not kept:
        _refuse_all(problems)
    places[:] = [places[rows[0]] for rows in kept.values()]
    num_samples = _number_learned(args, {key: len(rows) for key, rows in kept.items()}, first)
    columns = [name for name in ("prompt", *_BESIDE) if name in dataset.column_names]
    rewards = dataset["reward"][:]
    return Dataset.from_dict(
        {
            **{name: [first[key][name] for key in kept] for name in columns},
            LOGGED_IDS: [[ids_of[i] for i in rows[:num_samples]] for rows in kept.values()],
            LOGGED_REWARDS: [[float(rewards[i]) for i in rows[:num_samples]] for rows in kept.values()],
        }
    )


def _number_learned(args: BONDConfig, counts: Mapping[str, int], first: Mapping[str, Mapping[str, Any]]) -> int:
    """How many samples per prompt the objective learns from; if it takes all, as many as every prompt has."""
    least = min(counts.values())
    number, wanted = (objective_of(args, num_logged=most).plan.total for most in (least, max(counts.values())))
    if number < wanted:
        shortest = next(first[key]["prompt"] for key, count in counts.items() if count == least)
        learned = {most: most * sum(count >= most for count in counts.values()) for most in counts.values()}
        best = max(learned, key=lambda most: learned[most])
        more = (
            f". Without the prompts that have fewer than {best}, {learned[best]} would be: remove these, or set "
            f"num_samples={best}, on_bad_row='skip' and max_skipped_frac"
        )
        _log.warning(
            "%d of %d scored samples are learned from, %d of each prompt: the prompt %s has no more%s",
            number * len(counts),
            sum(counts.values()),
            number,
            _short(shortest),
            more if best > number else "",
        )
    return number


def _refuse_all(problems: Sequence[str]) -> None:
    raise DataError("no scored sample can be used:\n" + listed(problems, "rows"))


def _ids_of_samples(dataset: Dataset, encoder: PromptEncoder, places: Sequence[str]) -> list[list[int]]:
    """The token ids of each sample as drawn, if the file has them, otherwise from its text."""
    found, reread = [], 0
    for row, place in zip(_rows(dataset), places, strict=True):
        ids = _drawn_ids(row, encoder)
        reread += ids is None and row.get(DRAWN_IDS) is not None
        found.append(_read_again(row, encoder, place) if ids is None else ids)
    if reread:
        _log.warning(
            "the token_ids of %d of %d samples are not their completion to this model: these are learned from the text",
            reread,
            len(found),
        )
    return found


def _leave_out_short(
    groups: Mapping[str, list[int]], prompts: Mapping[str, Any], least: int, bad: dict[int, str], *, each: bool
) -> None:
    """Note prompts with too few samples: each of their rows, or the first."""
    for key, rows in groups.items():
        if len(rows) < least:
            reason = (
                f"the prompt {_short(prompts[key])} has {len(rows)} scored samples, {least} are needed: score more, "
                "lower n, or remove the prompt"
            )
            bad |= dict.fromkeys(rows if each else rows[:1], reason)


def _drawn_ids(row: Mapping[str, Any], encoder: PromptEncoder) -> list[int] | None:
    """The drawn ids, if they match the completion for this model."""
    ids = row.get(DRAWN_IDS)
    if not ids or any(not 0 <= i < (encoder.sizes.head or len(encoder.tokenizer)) for i in ids):
        return None
    is_whole = (ids[-1] in encoder.eos_ids) == (row.get("finished") is not False)
    return list(ids) if is_whole and encoder.decode([[ids]]) == [[row["completion"]]] else None


def _read_again(row: Mapping[str, Any], encoder: PromptEncoder, place: str) -> list[int]:
    (ids,) = encoder.encode_answers([row["completion"]], [row["prompt"]], lambda _: place)
    return ids[:-1] if row.get("finished") is False else ids


def _rows(dataset: Dataset) -> Dataset:
    columns = [
        c for c in ("prompt", "completion", "reward", "finished", DRAWN_IDS, *_BESIDE) if c in dataset.column_names
    ]
    return dataset.select_columns(columns)


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["prompt"], *(row.get(name) for name in _BESIDE)], sort_keys=True)


def _least(args: BONDConfig) -> int:
    """The minimum number of scored samples per prompt."""
    return max(args.n, args.num_samples or 0)


def _settle(args: BONDConfig) -> None:
    """Check the settings, and fix the anchor."""
    if args.objective not in OFF_POLICY:
        raise ConfigError(
            f"train_dataset holds scored samples (columns completion and reward), but objective={args.objective!r} "
            f"draws its own: choose {', '.join(OFF_POLICY)}, or remove these columns"
        )
    if args.missing_eos != "keep":
        raise ConfigError(
            f"missing_eos={args.missing_eos!r}: it looks at samples that the run draws, but these are scored already. "
            "Remove it; the rows of `bondlm score` say which samples are `finished`"
        )
    if args.truncate_prompt != "never":
        raise ConfigError(
            f"truncate_prompt={args.truncate_prompt!r}: the samples were drawn for whole prompts. Remove it, or the "
            "prompts that are too long"
        )
    for name in ("anchor", "eta", "anchor_update_every"):
        if (value := args.given.get(name, "fixed")) != "fixed":
            raise ConfigError(
                f"{name}={value!r}: scored samples were drawn from the model as it was, so that the anchor is fixed; "
                "remove the setting"
            )
    args.anchor = args.given["anchor"] = "fixed"


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
