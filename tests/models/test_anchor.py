from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bondlm.models.anchor import Anchor

ETA = 0.02
Pairs = list[tuple[str, nn.Parameter, nn.Parameter]]


def pairs_of(
    drift: float, dtype: torch.dtype = torch.float32, *, shapes: tuple[tuple[int, ...], ...] = ((40, 50), (7,))
) -> Pairs:
    """Anchor and policy of random weights that differ by `drift`, relative to their size."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i, shape in enumerate(shapes):
        start = 0.02 * torch.randn(shape, generator=generator)
        policy = start * (1 + drift * torch.randn(shape, generator=generator))
        pairs.append((f"w{i}", nn.Parameter(start.to(dtype), requires_grad=False), nn.Parameter(policy.to(dtype))))
    return pairs


def anchor_of(pairs: Pairs, schedule: Any = "ema", eta: float = ETA, update_every: int = 1) -> Anchor:
    return Anchor(pairs, schedule=schedule, eta=eta, update_every=update_every)


def with_bf16_master(pairs: Pairs) -> Anchor:
    """The trap: an anchor whose master copy is the bf16 weights themselves."""
    anchor = anchor_of(pairs)
    for name, weights, _ in pairs:
        anchor._master[name] = weights.data
    return anchor


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("eta", [0.0, 0.02, 0.5, 1.0])
def test_ema_towards_a_fixed_policy_has_its_closed_form(eta: float, steps: int) -> None:
    pairs = pairs_of(0.3)
    start = [anchor.double().clone() for _, anchor, _ in pairs]
    anchor = anchor_of(pairs, eta=eta)
    for step in range(1, steps + 1):
        anchor.update(step)
    share = 1 - (1 - eta) ** steps
    for (_, moved, policy), begin in zip(pairs, start, strict=True):
        torch.testing.assert_close(moved.double(), begin + share * (policy.double() - begin), atol=1e-7, rtol=1e-5)


def test_ema_of_a_moving_policy_is_the_recursion() -> None:
    pairs = pairs_of(0.0, shapes=((3,),))
    (_, weights, policy), anchor = pairs[0], anchor_of(pairs, eta=0.3)
    expected = weights.double().clone()
    for step in range(1, 20):
        with torch.no_grad():
            policy.add_(torch.tensor([1.0, -0.5, 0.1]))
        anchor.update(step)
        expected = 0.7 * expected + 0.3 * policy.detach().double()
    torch.testing.assert_close(weights.double(), expected, atol=0, rtol=1e-5)


def test_eta_zero_never_moves_and_eta_one_copies() -> None:
    for eta in (0.0, 1.0):
        pairs = pairs_of(0.5)
        expected = [(anchor if eta == 0 else policy).detach().clone() for _, anchor, policy in pairs]
        anchor_of(pairs, eta=eta).update(1)
        assert all(torch.equal(anchor, want) for (_, anchor, _), want in zip(pairs, expected, strict=True))


def test_periodic_copies_at_every_kth_step_only() -> None:
    pairs = pairs_of(0.5, shapes=((5,),))
    (_, weights, policy), anchor = pairs[0], anchor_of(pairs, "periodic", update_every=3)
    before = weights.clone()
    for step in range(1, 10):
        with torch.no_grad():
            policy.add_(1.0)
        metrics = anchor.update(step)
        assert ("anchor/gap_closed" in metrics) == (step % 3 == 0)
        if step % 3 == 0:
            before = policy.detach().clone()
        assert torch.equal(weights, before)


def test_fixed_never_moves_and_still_tells_its_distance() -> None:
    pairs = pairs_of(0.5)
    before = [anchor.clone() for _, anchor, _ in pairs]
    distance = sum(float((p - a).detach().double().square().sum()) for _, a, p in pairs) ** 0.5
    anchor = anchor_of(pairs, "fixed", eta=1.0)
    for step in range(1, 4):
        assert anchor.update(step) == {"anchor/distance": pytest.approx(distance, rel=1e-6)}
    assert all(torch.equal(a, b) for (_, a, _), b in zip(pairs, before, strict=True))


def test_the_policy_is_never_touched() -> None:
    pairs = pairs_of(0.5)
    before = [policy.detach().clone() for _, _, policy in pairs]
    anchor_of(pairs, eta=0.7).update(1)
    assert all(torch.equal(policy, b) for (_, _, policy), b in zip(pairs, before, strict=True))
    assert all(policy.requires_grad for _, _, policy in pairs)


def gap_closed(anchor: Anchor, steps: int = 100) -> list[float]:
    return [anchor.update(step)["anchor/gap_closed"] for step in range(1, steps + 1)]


def moves(values: list[float]) -> bool:
    """The check of the metric: every step closes the share of the gap that it should."""
    return all(abs(value - 1) < 0.02 for value in values)


@pytest.mark.parametrize("drift", [0.001, 0.01, 0.05])
def test_a_bf16_model_has_an_anchor_that_moves(drift: float) -> None:
    pairs = pairs_of(drift, torch.bfloat16)
    anchor = anchor_of(pairs)
    assert {tensor.dtype for tensor in anchor.state_dict().values()} == {torch.float32}
    start = {name: tensor.clone() for name, tensor in anchor.state_dict().items()}
    assert moves(gap_closed(anchor))
    share = 1 - (1 - ETA) ** 100
    for name, weights, policy in pairs:
        master = anchor.state_dict()[name]
        expected = start[name] + share * (policy.detach().float() - start[name])
        torch.testing.assert_close(master, expected, atol=1e-8, rtol=1e-4)
        assert torch.equal(weights, master.bfloat16())  # what samples is the rounded master


@pytest.mark.parametrize("drift", [0.001, 0.01, 0.05])
def test_the_same_check_fails_a_bf16_master(drift: float) -> None:
    anchor = with_bf16_master(pairs_of(drift, torch.bfloat16))
    values = gap_closed(anchor)
    assert not moves(values)
    assert values[-1] < 0.3  # and it is not a near miss: it hardly moves


@pytest.mark.parametrize("drift", [1e-4, 0.01, 1.0])
def test_an_fp32_model_closes_the_gap(drift: float) -> None:
    assert moves(gap_closed(anchor_of(pairs_of(drift)), steps=50))


def test_no_gap_gives_no_ratio() -> None:
    assert anchor_of(pairs_of(0.0)).update(1) == {"anchor/distance": 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_goes_on_bitwise(dtype: torch.dtype) -> None:
    pairs = pairs_of(0.2, dtype)
    anchor = anchor_of(pairs)
    for step in range(1, 6):
        anchor.update(step)
    saved = {name: tensor.clone() for name, tensor in anchor.state_dict().items()}
    other_pairs = pairs_of(0.2, dtype)
    other = anchor_of(other_pairs)
    other.load_state_dict(saved)
    for step in range(6, 11):
        anchor.update(step)
        other.update(step)
    for (name, weights, _), (_, other_weights, _) in zip(pairs, other_pairs, strict=True):
        assert torch.equal(weights, other_weights)
        assert torch.equal(anchor.state_dict()[name], other.state_dict()[name])
        assert not torch.equal(saved[name], anchor.state_dict()[name])


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"x{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda state: {}, KeyError),
        (renamed, KeyError),
        (lambda state: state | {"more": torch.zeros(1)}, KeyError),
        (lambda state: {name: tensor[:1] for name, tensor in state.items()}, ValueError),
        (lambda state: state | {"w1": torch.zeros(8)}, ValueError),
    ],
    ids=["empty", "renamed", "extra", "shape that broadcasts", "other shape"],
)
def test_a_state_that_does_not_fit_is_refused_whole(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], error: type[Exception]
) -> None:
    pairs = pairs_of(0.2)
    anchor = anchor_of(pairs)
    state = {name: tensor + 1 for name, tensor in anchor.state_dict().items()}
    before = [weights.clone() for _, weights, _ in pairs]
    with pytest.raises(error):
        anchor.load_state_dict(spoil(state))
    assert all(torch.equal(weights, b) for (_, weights, _), b in zip(pairs, before, strict=True))


def test_who_shares_the_anchors_weights_is_told_before_others_are_loaded() -> None:
    anchor = anchor_of(pairs_of(0.2))
    state = {name: tensor.clone() for name, tensor in anchor.state_dict().items()}
    told: list[bool] = []
    anchor.before_other_weights = lambda: told.append(
        all(torch.equal(anchor.state_dict()[n], t) for n, t in state.items())
    )
    anchor.load_state_dict(state)
    assert told == []  # the same weights
    anchor.load_state_dict({name: tensor + 1 for name, tensor in state.items()})
    assert told == [True]
