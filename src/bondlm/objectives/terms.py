"""The few operations that objectives share."""

import torch
from torch import Tensor

from bondlm.objectives.base import Loss, SamplePlan, Selection


def argmax_random_ties(values_PM: Tensor, noise_PM: Tensor) -> Tensor:
    """Index (P,) of the largest value of each row; a tie goes to the largest noise, never to the first position.

    `argmax` alone would favour position 0, and would call NaN the largest: rewards have been checked to be finite.
    """
    is_best = values_PM == values_PM.amax(dim=1, keepdim=True)
    return torch.where(is_best, noise_PM, -torch.ones_like(noise_PM)).argmax(dim=1)


def leave_one_out_mean(values: Tensor) -> Tensor:
    """For each value, the mean of all the others; 0 when there are no others.

    The baseline of BOND (Sessa et al. 2024, section 4.2): the average return of the other generations in the batch. It
    must not contain the sample itself, or the gradient is biased.
    """
    if values.numel() < 2:
        return torch.zeros_like(values)
    return (values.sum() - values) / (values.numel() - 1)


def own_samples(num_samples: int) -> SamplePlan:
    """Draw m samples of the policy for each prompt, learn from all of them."""
    return SamplePlan(policy=num_samples, anchor=0, learn=num_samples, compare=num_samples)


def learn_from_all(signal_PM: Tensor) -> Selection:
    """Every sample is learned from, each with its own signal."""
    return Selection(torch.arange(signal_PM.shape[1], device=signal_PM.device).expand(len(signal_PM), -1), signal_PM)


def mean_of_prompts_others(returns_PC: Tensor) -> Tensor:
    """RLOO's baseline: for each of a prompt's C >= 2 returns, the mean of the prompt's other returns.

    Ahmadian et al. 2024, arXiv 2402.14740, Eq. 8.
    """
    return (returns_PC.sum(dim=1, keepdim=True) - returns_PC) / (returns_PC.shape[1] - 1)


def policy_gradient(logp_PL: Tensor, advantage_PL: Tensor) -> Loss:
    """REINFORCE's loss, for each prompt the mean over its samples of -log pi(y) times the (detached) advantage."""
    return Loss((-logp_PL * advantage_PL).mean(dim=1), {"bond/advantage": advantage_PL.mean(dim=1)})


def with_share_without_signal(loss: Loss, signal_PC: Tensor) -> Loss:
    """The loss, with a metric: the share of prompts whose samples all tie, so nothing is learned from their rewards."""
    all_tied_P = (signal_PC == signal_PC[:, :1]).all(dim=1)  # not "all 0": GRPO's rounding leaves 1e-13
    return loss._replace(metrics=loss.metrics | {"bond/frac_no_signal": all_tied_P.to(loss.loss_P.dtype)})
