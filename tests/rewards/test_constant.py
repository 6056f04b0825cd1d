"""Rewards that are the same for all completions of a prompt are noticed, with what is likely behind them."""

import torch

from bondlm.rewards.constant import constant_rewards

TEXT, CHAT = ["a", "b"], [[{"role": "user", "content": "a"}]] * 2
TWO = [["x", "y", "z"], ["x", "y", "y"]]


def test_the_likely_cause_depends_on_prompts_and_completions() -> None:
    same = torch.tensor([[-1.0, -1.0, -1.0], [0.5, 0.5, 0.5]])
    of_text, of_chat = constant_rewards(same, TWO, TEXT), constant_rewards(same, TWO, CHAT)
    assert of_text is not None
    assert "2 of 2 prompts (-1 for the first)" in of_text
    assert of_chat is not None
    assert 'completion[0]["content"]' in of_chat
    assert 'completion[0]["content"]' not in of_text
    of_one_answer = constant_rewards(same, [["x"] * 3] * 2, CHAT)
    assert of_one_answer is not None
    assert "one way" in of_one_answer


def test_rewards_that_tell_apart_pass() -> None:
    assert constant_rewards(torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 0.4]]), TWO, TEXT) is None
    assert constant_rewards(torch.tensor([[1.0], [2.0]]), [["x"], ["y"]], TEXT) is None  # nothing to compare
    assert constant_rewards(torch.zeros(0, 3), [], []) is None
    assert constant_rewards(torch.full((2, 3), float("nan")), TWO, TEXT) is None


def test_nearly_all_are_enough() -> None:
    rewards = torch.zeros(20, 4)
    rewards[3, 1] = 1.0
    texts = [[f"{i}-{j}" for j in range(4)] for i in range(20)]
    found = constant_rewards(rewards, texts, ["p"] * 20)
    assert found is not None
    assert "19 of 20" in found
    rewards[4:8, 1] = 1.0
    assert constant_rewards(rewards, texts, ["p"] * 20) is None
