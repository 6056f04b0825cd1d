"""The few operations that objectives share."""

import torch
from torch import Tensor


def argmax_random_ties(values_PM: Tensor, noise_PM: Tensor) -> Tensor:
    """Index (P,) of the largest value of each row; a tie goes to the largest noise, never to the first position.

    `argmax` alone would favour position 0, and would call NaN the largest: rewards are checked to be finite before.
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
