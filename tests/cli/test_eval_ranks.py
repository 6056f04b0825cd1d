"""`bondlm eval` with rewards that rank, and with several goals."""

import json

import pytest
from rewards.judge_stub import as_presented, by_scalar, judging, scalar

from bondlm.cli import main
from cli.helpers import with_other
from cli.test_eval import job, rows

RANKS = """
def letters(prompt, completions):
    texts = [c[-1]["content"] for c in completions]
    values = [text.count("e") + 0.01 * len(text) for text in texts]
    ranking = sorted(range(len(values)), key=lambda i: -values[i])
    return values if len(set(values)) < len(values) else {"ranking": ranking}
"""


def test_a_ranking_shows_the_win_rate_and_the_n_of_the_scalar(tmp_path):
    arguments = job(tmp_path, num_prompts=6)
    (tmp_path / "ranks.py").write_text(RANKS)
    results = []
    for name, reward in (("out", f"{tmp_path}/reward.py:letters"), ("ranked", f"rank:{tmp_path}/ranks.py:letters")):
        assert main([*with_other(arguments, "--reward_funcs", reward), "--output", f"{tmp_path}/{name}"]) == 0
        results.append(json.loads((tmp_path / name / "eval.json").read_text()))
    scalar, ranked = results
    for name in ("win_rate", "effective_n", "log_quantile", "against_best_of", "kl_of_best_of_n"):
        assert scalar[name] == ranked[name], name
    for name, numbers in scalar["baselines"].items():
        assert numbers.get("win_rate") == ranked["baselines"][name].get("win_rate")
        assert numbers.get("effective_n") == ranked["baselines"][name].get("effective_n")
    assert ranked["reward"]["value"] == pytest.approx(ranked["win_rate"]["value"])  # its rank among the reference's
    assert {row["reward"] for row in rows(tmp_path / "ranked" / "policy.jsonl")} <= {i / 16 for i in range(17)}


def test_several_goals_are_shown_together_and_each_by_itself(tmp_path, capsys):
    arguments = [*job(tmp_path, num_prompts=6), "--reward_aggregation", "quantile"]
    rewards = json.dumps([f"{tmp_path}/reward.py:letters", f"{tmp_path}/judge.py:short"])
    assert main(with_other(arguments, "--reward_funcs", rewards)) == 0
    shown = capsys.readouterr().out
    assert "Each reward by itself" in shown
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert set(result["goals"]) == {"letters", "short"}
    way = {"reward_weights": [1.0, 1.0], "reward_aggregation": "quantile"}
    assert {name: result[name] for name in ("rewards", *way)} == {"rewards": ["letters", "short"]} | way
    assert all({"win_rate", "effective_n", "gain"} <= set(goal) for goal in result["goals"].values())
    policy, reference = [rows(tmp_path / "out" / f"{name}.jsonl") for name in ("policy", "reference")]
    wins = []
    for prompt in range(6):
        others = reference[8 * prompt : 8 * prompt + 8]
        for row in policy[3 * prompt : 3 * prompt + 3]:
            ranks = [
                sum(
                    (o["rewards"][n] < row["rewards"][n]) + 0.5 * (o["rewards"][n] == row["rewards"][n]) for o in others
                )
                / 8
                for n in ("letters", "short")
            ]
            assert row["reward"] == pytest.approx(sum(ranks) / 2)
            wins.append(sum((o["reward"] < row["reward"]) + 0.5 * (o["reward"] == row["reward"]) for o in others) / 8)
    assert result["win_rate"]["value"] == pytest.approx(sum(wins) / len(wins))
    assert main([*with_other(arguments, "--reward_funcs", rewards), "--reward_tolerances", "[1, 2]"]) == 2
    (again,) = [json.loads((tmp_path / "out" / "eval.json").read_text())]
    assert again == result


def test_a_reward_that_is_none_for_the_greedy_answers_alone_is_refused(tmp_path, capsys):
    """The mean of that row was a sum without one of its terms."""
    arguments = job(tmp_path, num_prompts=6)
    (tmp_path / "box.py").write_text(
        "def box(prompts, completions, **_):\n"
        "    return [None if len(prompts) == len({str(p) for p in prompts}) else 1.0] * len(prompts)\n"
    )
    rewards = json.dumps([f"{tmp_path}/reward.py:letters", f"{tmp_path}/box.py:box"])
    assert main(with_other(arguments, "--reward_funcs", rewards)) == 4
    assert "'box' is None" in " ".join(capsys.readouterr().err.split())


def test_a_judge_compares_answers_pair_by_pair_and_the_samples_do_not_depend_on_it(tmp_path, capsys):
    arguments = job(tmp_path, num_prompts=6)
    for says, wins in ((by_scalar, scalar), (as_presented, lambda text: 0.0)):
        with judging(says) as server:
            assert main([*arguments, "--judge", server.spec(), "--judge", f"{tmp_path}/judge.py:short"]) == 0
            calls = len(server.requests)
        shown = " ".join("".join(capsys.readouterr()).split())
        result = json.loads((tmp_path / "out" / "eval.json").read_text())
        policy, reference = [rows(tmp_path / "out" / f"{name}.jsonl") for name in ("policy", "reference")]
        for name, n in (("reference", 1), ("reference, best of 4", 4)):
            expected = []
            for i in range(6):
                best = max(reference[8 * i : 8 * i + n], key=lambda row: row["reward"])
                mine, theirs = wins(policy[3 * i]["completion"]), wins(best["completion"])
                expected.append((mine > theirs) + 0.5 * (mine == theirs))
            assert result["pairwise"]["small"]["win_rate"][name]["value"] == pytest.approx(sum(expected) / 6)
        assert set(result["judges"]) == {"short"}
        assert result["pairwise"]["small"]["num_failed"] == 0
        assert result["pairwise"]["small"]["num_pairs"] == calls / 2
        assert result["pairwise"]["small"]["agreement"] == (says is by_scalar)
        assert any("'small' decides only 0% of" in w for w in result["warnings"]) == (says is as_presented)
        assert f"small: {calls // 2} pairs in both orders" in shown
        assert f"judge small: {calls} calls" in shown
        assert "Before the judge small" in shown
