"""`eval.json` from samples whose worth is known, and the warnings that a reader needs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from bondlm.bestofn import best_of_n_kl, kl_bound
from bondlm.evaluation.statistics import summarize
from bondlm.runs.folder import plain
from evaluation.helpers import case, scored


def test_the_numbers_of_a_best_of_4_policy():
    policy, reference, others = case()
    result = summarize(policy, reference, others)
    assert result["effective_n"]["low"] <= 4 <= result["effective_n"]["high"]
    assert result["effective_n"]["text"].startswith(f"{result['effective_n']['value']:.1f} [")
    assert result["kl_of_best_of_n"] == pytest.approx(kl_bound(result["effective_n"]["value"]))
    assert result["kl_ratio"] == pytest.approx(1.2 / result["kl_of_best_of_n"])
    assert result["kl_per_token"]["value"] == pytest.approx(0.12)
    assert result["kl_k3"]["value"] == pytest.approx(math.expm1(-1.2) + 1.2)
    assert result["entropy"] == pytest.approx(2.0)
    n = math.ceil(result["effective_n"]["value"])
    assert result["cost"] == pytest.approx({"tokens": 10, "best_of_n_tokens": 10 * n, "n": n})
    baseline = result["baselines"]["reference, T=0.7"]
    assert baseline["win_rate"]["low"] <= 0.5 <= baseline["win_rate"]["high"]
    assert result["warnings"] == []
    assert "kl" not in baseline
    assert (result["num_prompts"], result["num_samples"], result["num_reference_samples"]) == (400, 4, 16)
    json.dumps(plain(result), allow_nan=False)


def test_no_ratio_where_best_of_n_needs_no_kl_or_nobody_knows_n():
    policy, reference, others = case(n=1, log_ratio=0.1)
    below = scored(policy.rewards_PM.numpy() - 1.0, log_ratio=0.1)
    above = scored(policy.rewards_PM.numpy() + 9.0, log_ratio=9.0)
    alike = scored(policy.rewards_PM.numpy() + 0.02, log_ratio=0.1)
    result = summarize(alike, reference, others)
    assert (result["effective_n"]["low"], result["kl_ratio"]) == (1.0, None)
    assert 0 < result["kl_of_best_of_n"] < 0.01  # what the KL of a policy whose N is not told from 1 is not divided by
    for samples, needed in ((below, 0.0), (above, kl_bound(16))):
        result = summarize(samples, reference, others)
        assert result["kl_ratio"] is None
        assert result["kl_of_best_of_n"] == pytest.approx(needed)


def test_no_ratio_where_the_kl_is_not_told_from_0():
    policy, reference, others = case()
    result = summarize(scored(policy.rewards_PM, log_ratio=-0.1), reference, others)
    assert (result["kl_ratio"], result["kl_of_best_of_n"] > 0.5) == (None, True)


def test_ties_make_best_of_n_cheaper_than_the_bound():
    policy, reference, others = case()
    tied = [scored((s.rewards_PM > 1.0).double(), log_ratio=1.2) for s in (policy, reference)]
    result = summarize(*tied, {name: scored((s.rewards_PM > 1.0).double()) for name, s in others.items()})
    n = result["effective_n"]["value"]
    assert 2 < n < 8
    p = float((reference.rewards_PM > 1.0).double().mean())
    exact = float(best_of_n_kl(np.array([1 - p, p]), np.array([0.0, 1.0]), n))
    # The shares of 16 samples differ from prompt to prompt, and the KL is not linear in them.
    assert 0.7 * exact < result["kl_of_best_of_n"] < 1.1 * exact < 0.9 * kl_bound(n)
    assert result["kl_ratio"] == pytest.approx(1.2 / result["kl_of_best_of_n"])
    assert result["curve"][3]["kl"] < kl_bound(4)


def test_every_order_has_a_win_rate_and_the_chosen_ones_have_intervals():
    policy, reference, others = case()
    result = summarize(policy, reference, others, orders=[3, 12])
    assert [point["n"] for point in result["against_best_of"]] == [3, 12]
    rates = [point["policy_win_rate"] for point in result["curve"]]
    assert len(rates) == 16
    assert rates[0] == pytest.approx(result["win_rate"]["value"])
    for point in result["against_best_of"]:
        assert point["win_rate"]["value"] == pytest.approx(rates[point["n"] - 1])
        assert point["win_rate"]["low"] <= 4 / (4 + point["n"]) <= point["win_rate"]["high"]


def test_an_opponent_is_met_and_baselines_have_all_the_columns():
    policy, reference, others = case()
    opponent = scored(case(n=8, seed=5)[0].rewards_PM)
    result = summarize(policy, reference, others, opponent=opponent)
    assert result["opponent"]["win_rate"]["low"] <= 1 / 3 <= result["opponent"]["win_rate"]["high"]  # 4 against 8
    assert "opponent" not in summarize(policy, reference, others)
    for row in (result, result["opponent"], result["baselines"]["reference"], result["baselines"]["reference, T=0.7"]):
        assert math.isnan(row["reward_length_correlation"])  # here all lengths are equal
    assert result["baselines"]["reference"]["log_quantile"]["value"] == pytest.approx(-(1 - 1 / 16))
    assert [("entropy" in result["baselines"][name]) for name in ("reference", "reference, T=0.7")] == [True, True]
    greedy = summarize(policy, reference, {"reference, greedy": others["reference, T=0.7"]})["baselines"]
    assert "entropy" not in greedy["reference, greedy"]  # of one answer it is 0, whatever the model's is
    low, high = (result["baselines"]["reference, T=0.7"]["log_quantile"][end] for end in ("low", "high"))
    assert low <= -(1 - 1 / 17) <= high
    assert result["kl_k3_per_token"]["value"] == pytest.approx((math.expm1(-1.2) + 1.2) / 10)


def warned(policy, reference, others, word):
    return [w for w in summarize(policy, reference, others)["warnings"] if word in w]


def test_over_optimisation_is_a_reward_that_rises_while_a_judge_falls():
    rng = np.random.default_rng(3)
    shape, ref_shape = (400, 4), (400, 16)
    judges = {"good": rng.normal(0.5, 1, shape), "bad": rng.normal(-0.5, 1, shape), "same": rng.normal(0, 1, shape)}
    ref_judges = {name: rng.normal(0, 1, ref_shape) for name in judges}
    policy, reference, others = case(judges=judges)
    reference = scored(reference.rewards_PM, judges=ref_judges)
    (warning,) = warned(policy, reference, others, "over-optimisation")
    assert "'bad' fell by 0.5" in warning
    unmoved = scored(case(n=1)[0].rewards_PM, log_ratio=0.0, judges=judges)
    assert warned(unmoved, reference, others, "over-optimisation") == []


def test_sharpening_verbosity_truncation_few_prompts_and_disagreement_are_said():
    policy, reference, _ = case()
    better = {"reference, greedy": scored(reference.rewards_PM[:, :1] + 5.0)}
    (warning,) = warned(policy, reference, better, "sharpening")
    assert "'reference, greedy' wins" in warning
    assert warned(*case(length=16.0), "longer") != []
    assert warned(*case(length=14.0), "longer") == []
    assert warned(*case(finished=0.0), "cut at the token budget") != []
    assert warned(*case(num_prompts=29), "only 29 prompts") != []
    narrow = scored(np.full((400, 4), 1.0), log_ratio=1.0)
    assert warned(narrow, reference, {}, "depends on how it is measured") != []


def test_a_policy_that_never_falls_short_is_said_and_has_no_ratio():
    _, reference, _ = case(num_prompts=150)
    passed = (reference.rewards_PM > -0.8).double()
    policy, reference = scored(np.ones((150, 4)), log_ratio=1.0), scored(passed, log_ratio=-0.5)
    result = summarize(policy, reference, {})
    assert result["effective_n"]["text"].startswith("> 16 [")
    assert 1 < result["effective_n"]["low"] < 4
    assert result["kl_ratio"] is None
    (warning,) = result["warnings"]
    assert "bounded from below only" in warning
    failed = np.ones((150, 4))
    failed[0, 0] = 0.0
    assert summarize(scored(failed, log_ratio=1.0), reference, {})["warnings"] == []


def test_win_rates_that_all_prompts_share_have_an_interval_and_rewards_that_they_share_have_none():
    reference = scored(np.random.default_rng(0).random((5, 16)), log_ratio=0.0, judges={"j": np.zeros((5, 16))})
    policy = scored(np.full((5, 4), 2.0), log_ratio=1.0, judges={"j": np.ones((5, 4))})
    result = summarize(policy, reference, {"policy, greedy": policy}, opponent=reference)
    shown = [result["win_rate"], result["judges"]["j"]["win_rate"], result["opponent"]["win_rate"]]
    shown += [result["baselines"]["policy, greedy"]["win_rate"], result["against_best_of"][2]["win_rate"]]
    for wins in shown:
        assert (wins["value"], wins["low"], wins["high"]) == pytest.approx((1.0, 0.025 ** (1 / 5), 1.0))
    assert result["reward"] == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_repeated_prompts_are_said_and_do_not_count_as_more():
    policy, reference, others = case(num_prompts=64)
    assert warned(policy, reference, others, "prompts") == []
    twice = [{"role": "user", "content": "hi"}], [{"role": "user", "content": "who?"}]
    few, repeated = warned(replace(policy, prompts=[*twice] * 32), reference, others, "prompts")
    assert few.startswith("only 2 prompts")
    assert repeated.startswith("of 64 held-out prompts only 2 are distinct")
    (repeated,) = warned(replace(policy, prompts=[*policy.prompts[:32]] * 2), reference, others, "prompts")
    assert "only 32 are distinct" in repeated
    hardly = [*policy.prompts[:60], *policy.prompts[:4]]
    assert warned(replace(policy, prompts=hardly), reference, others, "prompts") == []


def test_one_prompt_has_numbers_without_intervals():
    result = plain(summarize(*case(num_prompts=1)))
    assert result["win_rate"]["low"] is None
    assert result["effective_n"]["low"] == 1.0


def test_policy_samples_must_be_scored():
    policy, reference, others = case()
    with pytest.raises(ValueError, match="log-ratios"):
        summarize(scored(policy.rewards_PM), reference, others)
