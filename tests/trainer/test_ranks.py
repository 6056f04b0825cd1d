"""Whole runs whose rewards are orders: the same to the last bit as with any scalar that has this order."""

import zlib
from pathlib import Path
from typing import Any

import pytest
from tiny import prompt_rows

from bondlm import BONDTrainer
from bondlm.errors import ConfigError
from bondlm.rewards import RankReward
from bondlm.runs.folder import DROPPED_FILE
from trainer.helpers import logged, same, trainer, weights, without_times


def scalar(completions: list[str]) -> list[float]:
    """Any number that has few ties."""
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def order(prompt: str, completions: list[str]) -> dict[str, list[int]]:
    values = scalar(completions)
    return {"ranking": sorted(range(len(values)), key=lambda i: -values[i])}


def run(folder: Path, reward: Any, **settings: Any) -> BONDTrainer:
    made = trainer(folder, reward=reward, **{"max_steps": 2} | settings)
    made.train()
    return made


def test_the_order_of_a_scalar_trains_as_the_scalar(tmp_path: Path) -> None:
    one = run(tmp_path / "scalar", scalar)
    other = run(tmp_path / "order", RankReward(order))
    assert same(weights(one.roles.model), weights(other.roles.model))
    of_rewards = {name for row in logged(tmp_path / "order") for name in row if "reward" in name}
    kept = [
        [{k: v for k, v in row.items() if k not in of_rewards and "scalar" not in k} for row in without_times(rows)]
        for rows in (logged(tmp_path / "scalar"), logged(tmp_path / "order"))
    ]
    assert kept[0] == kept[1]
    held_out = prompt_rows(20)[12:]
    metrics = [made.evaluate(held_out) for made in (one, other)]
    for name in ("eval_win_rate", "eval_effective_n", "eval_win_rate_low", "eval_effective_n_high", "eval_kl"):
        assert metrics[0][name] == metrics[1][name], name


def rescaled(reward: Any) -> Any:
    def other(completions: list[str]) -> list[float]:
        return [1e9 * value**3 - 7 for value in reward(completions)]

    other.__name__ = reward.__name__
    return other


def test_rescaling_any_reward_changes_no_bit(tmp_path: Path) -> None:
    sets = {"plain": [scalar, length], "length": [scalar, rescaled(length)], "scalar": [rescaled(scalar), length]}
    made = {name: run(tmp_path / name, rewards, reward_aggregation="quantile") for name, rewards in sets.items()}
    held_out = prompt_rows(20)[12:]
    metrics = {name: one.evaluate(held_out) for name, one in made.items()}
    for name in ("length", "scalar"):
        assert same(*[weights(made[each].roles.model) for each in ("plain", name)])
        rows = [without_times(logged(tmp_path / each)) for each in ("plain", name)]
        kept = [[{k: v for k, v in row.items() if f"rewards/{name}" not in k} for row in each] for each in rows]
        assert kept[0] == kept[1]
        for metric in ("eval_reward", "eval_win_rate", "eval_effective_n", f"eval_rewards/{name}/win_rate"):
            assert metrics["plain"][metric] == metrics[name][metric]
    assert {f"eval_rewards/{name}/effective_n" for name in ("scalar", "length")} <= metrics["plain"].keys()


def test_the_first_of_lexicographic_rewards_decides(tmp_path: Path) -> None:
    how: dict[str, Any] = {"reward_aggregation": "lexicographic", "max_steps": 1}
    tolerant = how | {"reward_tolerances": [1.0, 0.0]}
    alone = run(tmp_path / "alone", length, max_steps=1)
    both = [run(tmp_path / str(i), [scalar, length], **each) for i, each in enumerate((how, tolerant))]
    second, first, other = [weights(made.roles.model) for made in (alone, *both)]
    assert same(second, other)  # all are equal under the first
    assert not same(first, second)


def test_a_prompt_without_a_ranking_is_dropped_whole(tmp_path: Path) -> None:
    bad = prompt_rows(4)[2]["prompt"]

    def rank(prompt: str, completions: list[str]) -> Any:
        return {"ranking": [0]} if prompt == bad else order(prompt, completions)

    run(tmp_path, RankReward(rank), rows=4, max_steps=1)
    (row,) = (tmp_path / DROPPED_FILE).read_text().splitlines()
    assert bad in row
    assert "did not rank" in row


@pytest.mark.parametrize("how", [{"reward": RankReward(order)}, {"reward": [scalar], "reward_aggregation": "quantile"}])
def test_objectives_of_values_take_ranks_where_the_user_says_so(how: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ranks_as_values=True"):
        trainer(tmp_path, objective="rloo", **how)
    with pytest.raises(ConfigError, match="one sample per prompt"):
        trainer(tmp_path, objective="reinforce", ranks_as_values=True, **how)
    with pytest.raises(ConfigError, match=r"ranks_as_values=True.*'jbond'"):
        trainer(tmp_path, ranks_as_values=True, **how)
    made = run(tmp_path, how.pop("reward"), objective="rloo", ranks_as_values=True, **how)
    assert all(row["reward"] == pytest.approx(0.5) for row in logged(tmp_path) if "reward" in row)
    assert made.state.global_step == 2


def test_settings_without_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ranks_as_values"):
        trainer(tmp_path, objective="rloo", ranks_as_values=True)
    with pytest.raises(ConfigError, match="reward_tolerances"):
        trainer(tmp_path, reward_tolerances=[0.1])
    with pytest.raises(ConfigError, match=r"reward_tolerances.*2 entries for 1 rewards"):
        trainer(tmp_path, reward_aggregation="lexicographic", reward_tolerances=[0.1, 0.0])
