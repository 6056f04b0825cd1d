import pytest

from bondlm.evaluation.describe import describe_config, describe_objective, describe_rewards
from bondlm.objectives import BOND, JBOND, SelfBOND
from bondlm.rewards import SUM, Aggregation, NamedReward


def test_an_objective_is_described_by_its_settings():
    assert describe_objective("jbond", JBOND(beta=0.25)) == {
        "name": "jbond",
        "n": 2,
        "beta": 0.25,
        "gamma": 0.0,
        "num_anchor_samples": 2,
        "log_quantile": "jbond",
    }
    assert describe_objective("bond", BOND(n=8))["n"] == 8


def test_a_strength_that_was_solved_is_said():
    assert describe_objective("self_bond", SelfBOND(n=8))["strength"] == pytest.approx(5.50, abs=5e-3)
    assert "strength" not in describe_objective("jbond", JBOND())


def test_a_config_that_names_little_is_described_whole_and_by_its_own_knobs():
    assert describe_config({"objective": "best_of_n_sft", "n": 8, "anchor": "fixed", "model": "m"}) == {
        "name": "best_of_n_sft",
        "n": 8,
        "anchor": "fixed",
        "learning_rate": 3e-6,
    }
    assert describe_config({"use_peft": True, "beta": 0.25}) == describe_objective("jbond", JBOND(beta=0.25)) | {
        "anchor": "ema",
        "eta": 0.02,
        "learning_rate": 1e-4,
    }
    own = describe_config({"objective": "self_bond", "n": 4})  # the anchor follows the objective
    assert own == describe_objective("self_bond", SelfBOND(n=4)) | {
        "anchor": "fixed",
        "learning_rate": 3e-6,
        "average_weights": 1 / 3,  # its default is on
    }
    assert "average_weights" not in describe_config({"objective": "self_bond", "lr_scheduler_type": "cosine"})
    assert describe_config({"gamma_ref": 0.5})["gamma_ref"] == 0.5
    assert "num_samples" not in describe_config({"objective": "best_of_n_regression", "n": 4, "anchor": "fixed"})


@pytest.mark.parametrize("objective", ["bonbon", "best_of_n_sft", "listwise", "best_of_n_regression"])
def test_an_anchor_that_depends_on_the_data_is_left_out(objective):
    """Fixed where the run learned from scored samples, and otherwise moving: the settings do not tell."""
    assert not {"anchor", "eta"} & describe_config({"objective": objective, "n": 4}).keys()
    assert describe_config({"objective": objective, "n": 4, "anchor": "ema"})["eta"] == 0.02


@pytest.mark.parametrize(
    ("aggregation", "said"),
    [
        (SUM, {"reward_aggregation": "sum"}),
        (Aggregation("worst"), {"reward_aggregation": "worst"}),
        (Aggregation("lexicographic"), {"reward_aggregation": "lexicographic", "reward_tolerances": [0.0, 0.0]}),
        (
            Aggregation("lexicographic", [0.5, 0]),
            {"reward_aggregation": "lexicographic", "reward_tolerances": [0.5, 0]},
        ),
    ],
)
def test_all_that_makes_one_reward_of_several_is_described(aggregation, said):
    rewards = [NamedReward("length", len), NamedReward("half", len, weight=-1.0)]
    assert describe_rewards(rewards, aggregation) == {
        "rewards": ["length", "half"],
        "reward_weights": [1.0, -1.0],
        **said,
    }
