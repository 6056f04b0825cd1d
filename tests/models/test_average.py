"""The running average of weights: its closed forms, and that it comes and goes without a trace."""

import pytest
import torch
from torch import Tensor, nn

from bondlm.models.average import WeightAverage


def averaged(fraction: float, steps: int) -> tuple[nn.Linear, WeightAverage, list[Tensor]]:
    """A layer that moves `steps` times, its average, and the weights after each step; the bias is frozen."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    average, seen = WeightAverage(layer, fraction), []
    for step in range(1, steps + 1):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        average.update(step)
        seen.append(layer.weight.detach().clone())
    return layer, average, seen


def test_fraction_one_is_the_plain_mean() -> None:
    _, average, seen = averaged(1.0, 7)
    torch.testing.assert_close(average.state_dict()["weight"], torch.stack(seen).mean(dim=0))


def test_fraction_a_half_weighs_step_s_by_s_times_s_plus_one() -> None:
    """P = 2: the rising factorial s (s + 1) is the exact weight."""
    _, average, seen = averaged(0.5, 9)
    weights = torch.tensor([s * (s + 1.0) for s in range(1, 10)])
    want = (torch.stack(seen) * (weights / weights.sum())[:, None, None]).sum(dim=0)
    torch.testing.assert_close(average.state_dict()["weight"], want)


@pytest.mark.parametrize("fraction", [0.1, 1 / 3, 0.8])
def test_it_is_as_old_as_the_plain_average_over_the_last_fraction(fraction: float) -> None:
    layer = nn.Linear(1, 1, bias=False)
    average, steps = WeightAverage(layer, fraction), 3000
    for step in range(1, steps + 1):
        nn.init.constant_(layer.weight, float(step))
        average.update(step)
        if step in (600, steps):  # at any time, not only at a last step
            age = step - float(average.state_dict()["weight"])
            assert age == pytest.approx(fraction * step / 2, rel=0.02)


def test_it_takes_the_place_of_the_weights_and_leaves_them_bit_by_bit() -> None:
    layer, average, seen = averaged(0.4, 5)
    value = average.state_dict()["weight"].clone()

    def fails() -> None:
        with average.in_place():
            with average.in_place():  # an evaluation that saves, too
                assert torch.equal(layer.weight, value)
            assert torch.equal(layer.weight, value)
            raise RuntimeError("a reward fails")

    with pytest.raises(RuntimeError, match="reward"):
        fails()
    assert torch.equal(layer.weight, seen[-1])
    assert torch.equal(average.state_dict()["weight"], value)
    average.settle()
    assert torch.equal(layer.weight, value)
    with average.in_place():  # a run that is over has nothing to exchange
        assert torch.equal(layer.weight, value)
    average.update(1)  # the next one begins with its own first step
    assert torch.equal(average.state_dict()["weight"], value)


def test_it_goes_on_from_its_state_and_refuses_another_ones() -> None:
    layer, whole, seen = averaged(0.4, 6)
    resumed = WeightAverage(layer, 0.4)
    resumed.load_state_dict(averaged(0.4, 4)[1].state_dict())
    for step in (5, 6):
        with torch.no_grad():
            layer.weight.copy_(seen[step - 1])
        resumed.update(step)
    assert torch.equal(resumed.state_dict()["weight"], whole.state_dict()["weight"])
    with pytest.raises(KeyError):
        resumed.load_state_dict({"other": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="weight"):
        resumed.load_state_dict({"weight": torch.zeros(3)})


def test_nothing_is_averaged_where_it_is_off() -> None:
    layer, average, seen = averaged(0.0, 3)
    assert average.state_dict() == {}
    average.settle()
    assert torch.equal(layer.weight, seen[-1])
