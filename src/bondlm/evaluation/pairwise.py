"""Ranking judges in an evaluation: one sample of the policy against one of the reference, pair by pair.

Every pair is judged in both orders, so that a preference for the first answer cancels to a tie.

Shapes: P prompts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bondlm.bestofn.bootstrap import bootstrap_win_rate
from bondlm.data.columns import PROMPT_IDS, PROMPT_ROW
from bondlm.data.tokens import as_messages
from bondlm.errors import RewardError
from bondlm.evaluation.statistics import BEST_OF, interval
from bondlm.rewards import NamedReward, score
from bondlm.rollout.samples import Samples

REFERENCE = "reference"
LEAST_AGREEMENT, BY_PLACE = 0.7, 0.3  # between both orders: chance gives 0.5, judging only by place 0
FEW_DECIDED = 10  # fewer pairs say nothing about it


def in_given_order(reward: NamedReward) -> NamedReward:
    """The same reward; one that shuffles the answers (`JudgeReward`) keeps their order instead, and asks once."""
    return replace(reward, function=getattr(reward.function, "in_given_order", lambda: reward.function)())


def why_unsteady(agreement: float) -> str | None:
    """What is wrong with a ranking of this `agreement` between the two orders; None if nothing is."""
    if agreement < BY_PLACE:
        return "goes by the order in which answers are shown more than by the answers: chance is 50%"
    return "hardly agrees with itself: chance is 50%" if agreement < LEAST_AGREEMENT else None


@dataclass(frozen=True)
class Pairs:
    """The distinct pairs to judge, and for each opponent the index of its pair at each prompt.

    An index of None is a tie without a question, since the two texts are equal.
    """

    prompt_rows: list[int]
    first: list[str]  # the policy's
    second: list[str]
    of_opponent: dict[str, list[int | None]]


def pairs_of(policy: Samples, reference: Samples) -> Pairs:
    """The policy's first sample against the reference's first, and against its best of the first 2, 4 and 8."""
    opponents = {REFERENCE: [0] * len(policy.texts)}
    known = min(reference.rewards_PM.shape[1], min(len(texts) for texts in reference.texts))
    for n in BEST_OF:
        if n <= known:
            opponents[f"reference, best of {n}"] = reference.rewards_PM[:, :n].argmax(dim=1).tolist()
    numbers: dict[tuple[int, str], int] = {}
    of_opponent: dict[str, list[int | None]] = {}
    for name, chosen in opponents.items():
        of_opponent[name] = []
        for i, j in enumerate(chosen):
            text = reference.texts[i][j]
            is_equal = text == policy.texts[i][0]
            of_opponent[name].append(None if is_equal else numbers.setdefault((i, text), len(numbers)))
    rows = [i for i, _ in numbers]
    return Pairs(rows, [policy.texts[i][0] for i in rows], [text for _, text in numbers], of_opponent)


def compared(
    judges: Sequence[NamedReward],
    rows: Sequence[Mapping[str, Any]],
    policy: Samples,
    reference: Samples,
    result: Mapping[str, Any],
    on_pairs: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """What these judges add to `eval.json`: `judge_pairs`, and a warning if they contradict the optimised reward."""
    if not judges:
        return {}
    found = judge_pairs(judges, rows, policy, reference, on_pairs)
    lost = [
        f"over-optimisation: by the optimised reward the policy wins {result['win_rate']['value']:.3f}, but the judge "
        f"{name!r} prefers the reference: {numbers['win_rate'][REFERENCE]['value']:.3f}"
        for name, numbers in found.items()
        if REFERENCE in numbers["win_rate"]
        and numbers["win_rate"][REFERENCE]["high"] < 1 / 2 < result["win_rate"]["low"]
    ]
    unsteady = [
        f"the judge {name!r} decides only {numbers['agreement']:.0%} of the {numbers['num_decided']} pairs in which it "
        f"has a preference alike in both orders: it {why}. Its win rates say little"
        for name, numbers in found.items()
        if numbers["num_decided"] >= FEW_DECIDED and (why := why_unsteady(numbers["agreement"])) is not None
    ]
    return {"pairwise": found, "warnings": [*result["warnings"], *lost, *unsteady]}


def judge_pairs(
    judges: Sequence[NamedReward],
    rows: Sequence[Mapping[str, Any]],
    policy: Samples,
    reference: Samples,
    on_pairs: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """The policy's win rate according to each judge, in the format of `pairwise` in `eval.json`.

    Args:
        judges: rewards that rank.
        rows: P prompts, with the columns that the judges need.
        policy: samples of the policy; the first of each prompt is compared.
        reference: samples of the reference, with the optimised rewards, which select the best samples.
        on_pairs: called with the number of pairs that each judge will get, in both orders, before it is asked.

    Raises:
        RewardError: a judge ranks none of the pairs.
    """
    pairs = pairs_of(policy, reference)
    on_pairs(len(pairs.first))
    return {judge.name: _judged(judge, rows, pairs) for judge in judges}


def _judged(judge: NamedReward, rows: Sequence[Mapping[str, Any]], pairs: Pairs) -> dict[str, Any]:
    wins_2K = _wins(judge, rows, pairs)
    mean_K = wins_2K.mean(dim=0)  # NaN if one of the orders was not ranked
    known_K = ~mean_K.isnan()
    if len(mean_K) and not known_K.any():
        raise RewardError(f"judge {judge.name!r} ranked none of {len(mean_K)} pairs")
    against = {}
    for name, chosen in pairs.of_opponent.items():
        wins = torch.tensor([0.5 if k is None else float(mean_K[k]) for k in chosen], dtype=torch.float64)
        kept = wins[~wins.isnan()]
        if len(kept):
            against[name] = interval(bootstrap_win_rate(kept)) | {"num_prompts": len(kept)}
    decided_K = known_K & (wins_2K != 0.5).any(dim=0)  # a judge that has no preference agrees with nothing
    same = (wins_2K[0] == wins_2K[1])[decided_K]
    return {
        "win_rate": against,
        "num_pairs": len(mean_K),
        "num_failed": int((~known_K).sum()),
        "num_decided": len(same),
        "agreement": float(same.double().mean()) if len(same) else math.nan,
    }


def _wins(judge: NamedReward, rows: Sequence[Mapping[str, Any]], pairs: Pairs) -> Tensor:
    """The result of the policy's text (2, K) in both orders: 1, 1/2 or 0; NaN if there is no ranking."""
    count = len(pairs.first)
    if not count:
        return torch.zeros(2, 0, dtype=torch.float64)
    texts = [text for pair in zip(pairs.first, pairs.second, strict=True) for text in pair]
    texts += [text for pair in zip(pairs.second, pairs.first, strict=True) for text in pair]
    owner = [i for i in pairs.prompt_rows for _ in range(2)] * 2
    prompts = [rows[i]["prompt"] for i in owner]
    conversational = not isinstance(prompts[0], str)
    columns = {
        name: [rows[i][name] for i in owner] for name in rows[0] if name not in ("prompt", PROMPT_IDS, PROMPT_ROW)
    }
    judge = in_given_order(judge)
    groups = [k // 2 for k in range(len(texts))]
    completions = as_messages(texts) if conversational else texts
    scores = score([judge], prompts, completions, columns, groups=groups, allow_bad_rows=True)
    ranks = scores.by_name[judge.name].clone()
    ranks[list(scores.bad)] = torch.nan
    ranks_2K2 = ranks.view(2, count, 2)
    gaps_2K = torch.stack([ranks_2K2[0, :, 0] - ranks_2K2[0, :, 1], ranks_2K2[1, :, 1] - ranks_2K2[1, :, 0]])
    return ((gaps_2K.sign() + 1) / 2).masked_fill(gaps_2K.isnan(), torch.nan)  # the sign of NaN is 0
