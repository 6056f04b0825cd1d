"""What a run will cost and what N could buy, against closed forms, enumeration and Trainer's own count."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from tiny import prompt_rows
from trainer.helpers import trainer

from bondlm.evaluation.forecast import frontier, num_steps, tie_rate


def test_without_ties_best_of_n_wins_n_of_n_plus_1() -> None:
    rewards = torch.rand(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = list(frontier(rewards))
    assert [row.n for row in rows] == [1, 2, 4, 8]
    assert [row.win_rate.value for row in rows] == pytest.approx([1 / 2, 2 / 3, 4 / 5, 8 / 9])
    assert [row.kl_at_most for row in rows] == pytest.approx([0.0, 0.193, 0.636, 1.204], abs=5e-4)
    best_of_8 = torch.stack([rewards[:, list(c)].amax(1) for c in combinations(range(9), 8)]).mean()
    assert rows[-1].reward.value == pytest.approx(float(best_of_8))


def test_a_reward_of_one_value_buys_nothing() -> None:
    rewards = torch.zeros(3, 9, dtype=torch.float64)
    for row in frontier(rewards):
        assert tuple(row.win_rate) == pytest.approx((0.5, 0.5, 0.5))
    assert tie_rate(rewards) == 1.0


def test_ties_are_counted_by_pair() -> None:
    assert tie_rate(torch.tensor([[1.0, 1.0, 2.0], [1.0, 2.0, 3.0]])) == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 3},
        {"max_steps": -1, "num_train_epochs": 2},
        {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    ],
)
def test_steps_are_those_of_trainer(settings: dict[str, float], tmp_path: Path) -> None:
    made = trainer(tmp_path, train_dataset=prompt_rows(10), **settings)
    made.train()
    assert made.state.global_step == num_steps(made.args, range(10))
