"""Win rates from pairs in both orders, against plain counting, and judges with a bias that the two orders cancel."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bondlm.errors import RewardError
from bondlm.evaluation.pairwise import compared, judge_pairs, pairs_of, why_unsteady
from bondlm.evaluation.table import _print_pairwise
from bondlm.rewards import NamedReward, RankReward
from bondlm.rollout.samples import Samples

P, M = 40, 8
BEST = {f"reference, best of {n}": n for n in (2, 4, 8)}


def samples(texts: list[list[str]]) -> Samples:
    rewards = torch.tensor([[float(len(text)) for text in row] for row in texts], dtype=torch.float64)
    nothing = torch.zeros_like(rewards)
    return Samples(
        prompts=[f"p{i}" for i in range(len(texts))],
        texts=texts,
        rewards_PM=rewards,
        lengths_PM=nothing,
        finished_PM=nothing + 1,
        logprobs_PM=nothing,
    )


def case() -> tuple[list[dict[str, Any]], Samples, Samples]:
    rng = np.random.default_rng(0)
    policy = [["y" * int(rng.integers(1, 30)) for _ in range(2)] for _ in range(P)]
    reference = [["x" * int(rng.integers(1, 20)) for _ in range(M)] for _ in range(P)]
    policy[3][0] = reference[3][0] = "same"
    return [{"prompt": f"p{i}", "gold": "g"} for i in range(P)], samples(policy), samples(reference)


def longer(completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


def judged(function: Any) -> dict[str, Any]:
    rows, policy, reference = case()
    found: dict[str, Any] = judge_pairs([NamedReward("j", RankReward(function))], rows, policy, reference)["j"]
    return found


def test_win_rates_are_those_of_counting_with_ties_half() -> None:
    _, policy, reference = case()
    found = judged(longer)
    for name, n in {"reference": 1, **BEST}.items():
        wins = []
        for i in range(P):
            mine, theirs = len(policy.texts[i][0]), max(len(text) for text in reference.texts[i][:n])
            wins.append((mine > theirs) + 0.5 * (mine == theirs))
        assert found["win_rate"][name]["value"] == pytest.approx(np.mean(wins))
        assert found["win_rate"][name]["low"] < np.mean(wins) < found["win_rate"][name]["high"]
        assert found["win_rate"][name]["num_prompts"] == P
    assert found["agreement"] == 1.0
    assert found["num_failed"] == 0


def test_each_different_pair_is_asked_about_in_both_orders_and_equal_texts_are_not() -> None:
    asked: list[tuple[str, ...]] = []

    def note(prompt: str, completions: list[str], gold: str) -> list[int]:
        asked.append((prompt, *completions))
        return longer(completions)

    rows, policy, reference = case()
    told: list[int] = []
    judge_pairs([NamedReward("j", RankReward(note))], rows, policy, reference, told.append)
    assert told == [len(asked) / 2]
    assert len(set(asked)) == len(asked)
    assert {(p, b, a) for p, a, b in asked} == set(asked)
    assert not any(a == b for _, a, b in asked)
    assert pairs_of(policy, reference).of_opponent["reference"][3] is None


def test_a_judge_who_likes_what_comes_first_ties() -> None:
    found = judged(lambda completions: {"ranking": [0, 1]})
    assert all(rate["value"] == 0.5 for rate in found["win_rate"].values())
    assert found["agreement"] == 0.0


def test_a_judge_without_a_preference_agrees_with_nothing() -> None:
    found = judged(lambda completions: [0.0] * len(completions))
    assert all(rate["value"] == 0.5 for rate in found["win_rate"].values())
    assert math.isnan(found["agreement"])
    assert found["num_decided"] == 0
    sometimes = judged(lambda prompt, completions: longer(completions) if prompt < "p2" else [0.0] * len(completions))
    assert sometimes["agreement"] == 1.0
    assert 0 < sometimes["num_decided"] < sometimes["num_pairs"]


def test_pairs_without_a_ranking_are_left_out_and_counted() -> None:
    def rank(prompt: str, completions: list[str]) -> Any:
        return {"ranking": [0]} if prompt == "p1" else None if prompt > "p2" else longer(completions)

    found = judged(rank)
    assert found["num_failed"] > 0
    kept = [i for i in range(P) if f"p{i}" <= "p2" and i != 1] + [3]  # 3 has equal texts
    assert found["win_rate"]["reference"]["num_prompts"] == len(kept)
    with pytest.raises(RewardError, match="'j' ranked none"):
        judged(lambda completions: {"ranking": [0]})


def test_a_judge_that_contradicts_the_optimised_reward_is_warned_of() -> None:
    rows, policy, reference = case()
    result = {"win_rate": {"value": 0.8, "low": 0.7, "high": 0.9}, "warnings": ["old"]}
    contrary = NamedReward("j", RankReward(lambda completions: [-len(set(text) & {"y"}) for text in completions]))
    found = compared([contrary], rows, policy, reference, result)
    assert found["pairwise"]["j"]["win_rate"]["reference"]["value"] < 0.5
    assert found["warnings"][0] == "old"
    assert "over-optimisation" in found["warnings"][1]
    agreeing = compared([NamedReward("j", RankReward(longer))], rows, policy, reference, result)
    assert agreeing["warnings"] == ["old"]
    assert compared([], rows, policy, reference, result) == {}


def test_a_few_pairs_that_a_judge_decides_alike_are_no_proof() -> None:
    rows = [{"prompt": f"p{i}"} for i in range(3)]
    policy, reference = samples([["y"]] * 3), samples([["x"] * 2] * 3)
    result = {"win_rate": {"value": 0.8, "low": 0.7, "high": 0.9}, "warnings": []}
    contrary = NamedReward("j", RankReward(lambda completions: [-len(set(text) & {"y"}) for text in completions]))
    found = compared([contrary], rows, policy, reference, result)
    wins = found["pairwise"]["j"]["win_rate"]["reference"]
    assert (wins["value"], wins["low"], wins["high"]) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 3)))
    assert found["warnings"] == []


@pytest.mark.parametrize(("decided", "warns"), [(9, False), (10, True)])
def test_agreement_is_a_share_of_the_pairs_with_a_preference_and_a_few_prove_nothing(decided: int, warns: bool) -> None:
    rows = [{"prompt": f"p{i:02}"} for i in range(P)]
    policy, reference = samples([["y"]] * P), samples([["xx"]] * P)
    judge = RankReward(lambda prompt, completions: [1.0, 0.0] if prompt < f"p{decided:02}" else [0.0, 0.0])
    result = {"win_rate": {"value": 0.6, "low": 0.5, "high": 0.7}, "warnings": []}
    found = compared([NamedReward("j", judge)], rows, policy, reference, result)
    numbers = found["pairwise"]["j"]
    assert (numbers["num_pairs"], numbers["num_decided"], numbers["agreement"]) == (P, decided, 0.0)
    assert [f"0% of the {decided} pairs" in warning for warning in found["warnings"]] == [True] * warns
    console = Console(record=True, width=120, file=io.StringIO())
    _print_pairwise(console, found["pairwise"])
    assert f"decides 0% of {decided} pairs alike in both orders; in {P - decided} it has no" in console.export_text()
    undecided = {"j": numbers | {"num_decided": 0, "agreement": float("nan")}}
    _print_pairwise(console, undecided)
    assert f"has no preference in any of {P} pairs" in console.export_text()


@pytest.mark.parametrize(("agreement", "said"), [(0.0, "order"), (0.5, "itself"), (0.7, None), (float("nan"), None)])
def test_a_judge_that_disagrees_with_itself_is_warned_of(agreement: float, said: str | None) -> None:
    why = why_unsteady(agreement)
    assert why is None if said is None else said in str(why)
