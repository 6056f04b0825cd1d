"""What `missing_eos: worst` does to the rewards of a prompt, against every small case."""

import itertools

import pytest
import torch
from torch import Tensor

from bondlm.rollout.truncated import rank_truncated_last


def by_hand(rewards: list[float], finished: list[bool]) -> list[float]:
    whole = [r for r, f in zip(rewards, finished, strict=True) if f]
    cut = [r for r, f in zip(rewards, finished, strict=True) if not f]
    if not whole or not cut or max(cut) < min(whole):
        return rewards
    spread = max(rewards) - min(rewards) or 1.0
    down = max(cut) - min(whole) + spread
    return [r if f else r - down for r, f in zip(rewards, finished, strict=True)]


def signs(rewards: Tensor) -> Tensor:
    return (rewards[:, None] - rewards[None]).sign()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_small_group(size: int) -> None:
    """All rewards in {-1, 0, 2} and all ways to be cut: by hand, and what the function promises."""
    all_rewards, all_ends = (itertools.product(values, repeat=size) for values in ([-1.0, 0.0, 2.0], [False, True]))
    cases = list(itertools.product(all_rewards, all_ends))
    rewards_PM = torch.tensor([rewards for rewards, _ in cases], dtype=torch.float64)
    finished_PM = torch.tensor([finished for _, finished in cases])
    ranked_PM = rank_truncated_last(rewards_PM, finished_PM)
    assert ranked_PM.tolist() == [by_hand(list(rewards), list(finished)) for rewards, finished in cases]
    for before, after, whole in zip(rewards_PM, ranked_PM, finished_PM, strict=True):
        assert torch.equal(after[whole], before[whole])
        assert torch.equal(signs(after[~whole]), signs(before[~whole]))  # among the cut: order and ties stay
        if whole.any() and not whole.all():
            assert after[~whole].max() < after[whole].min()
        else:
            assert torch.equal(after, before)
        assert torch.equal(rank_truncated_last(after[None], whole[None])[0], after)  # done once, it is done


def test_the_values_are_of_the_rewards_own_scale() -> None:
    """As far below the lowest finished one as the rewards are apart, whatever they are multiplied with or added to."""
    rewards = torch.tensor([[5.0, 7.0, 6.0]], dtype=torch.float64)
    finished = torch.tensor([[True, False, False]])
    assert rank_truncated_last(rewards, finished).tolist() == [[5.0, 3.0, 2.0]]
    scaled = rank_truncated_last(1024 * rewards - 3, finished)
    assert scaled.tolist() == [[1024 * 5.0 - 3, 1024 * 3.0 - 3, 1024 * 2.0 - 3]]


def test_numbers_stay_finite_and_prompts_apart() -> None:
    rewards = torch.tensor([[-1e308, 1e308], [0.0, 1.0]], dtype=torch.float64)
    finished = torch.tensor([[True, False], [True, True]])
    ranked = rank_truncated_last(rewards, finished)
    assert ranked.isfinite().all()
    assert ranked[0, 1] < ranked[0, 0]
    assert torch.equal(ranked[1], rewards[1])
