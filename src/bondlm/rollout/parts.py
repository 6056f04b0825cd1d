"""Split samples by prompts and join them again, so that each of several processes scores a part."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bondlm.rollout.samples import Samples

_OF_PROMPTS = ("prompts", "texts", "prompt_ids", "completions")  # one entry for each prompt
_NUMBERS = ("rewards_PM", "lengths_PM", "finished_PM", "logprobs_PM")


def part_of(samples: Samples, places: Sequence[int]) -> Samples:
    """The samples of the prompts at these places, in this order; scored but not yet judged."""
    lists: dict[str, Any] = {name: _at(getattr(samples, name), places) for name in _OF_PROMPTS}
    numbers: dict[str, Any] = {name: getattr(samples, name)[list(places)] for name in _NUMBERS}
    new_place = {place: i for i, place in enumerate(places)}
    return replace(
        samples,
        **lists,
        **numbers,
        by_name={name: values[list(places)] for name, values in samples.by_name.items()},
        extras={name: _at(values, places) for name, values in samples.extras.items()},
        dropped={new_place[place]: reason for place, reason in samples.dropped.items() if place in new_place},
    )


def joined(parts: Sequence[tuple[Sequence[int], Samples]]) -> Samples:
    """The samples of all prompts, in order, from parts and the places of their prompts; a part may have no prompts.

    Values logged by `log_metric` are averaged over prompts. Values per sample (`log_extra`) that only some parts logged
    are None in the others.
    """
    parts = [(places, part) for places, part in parts if places]
    places = [place for own, _ in parts for place in own]
    found = [part for _, part in parts]
    lists: dict[str, Any] = {name: [x for part in found for x in getattr(part, name)] for name in _OF_PROMPTS}
    numbers: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in found]) for name in _NUMBERS}
    starts = [sum(len(own) for own, _ in parts[:i]) for i in range(len(parts))]
    together = Samples(
        **lists,
        **numbers,
        by_name={name: torch.cat([part.by_name[name] for part in found]) for name in found[0].by_name},
        extras={name: _extra(found, name) for name in dict.fromkeys(name for part in found for name in part.extras)},
        metrics=_mean_metrics(found),
        dropped={start + i: why for start, part in zip(starts, found, strict=True) for i, why in part.dropped.items()},
    )
    return part_of(together, sorted(range(len(places)), key=places.__getitem__))


def _at(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [values[place] for place in places] if values else []


def _extra(parts: Sequence[Samples], name: str) -> list[list[Any]]:
    return [row for part in parts for row in part.extras.get(name, [[None] * len(texts) for texts in part.texts])]


def _mean_metrics(parts: Sequence[Samples]) -> dict[str, float]:
    means = {}
    for name in dict.fromkeys(name for part in parts for name in part.metrics):
        logged = [(part.metrics[name], len(part.prompts)) for part in parts if name in part.metrics]
        means[name] = sum(value * count for value, count in logged) / sum(count for _, count in logged)
    return means
