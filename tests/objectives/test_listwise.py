"""Listwise BOND: its weights by hand and by enumeration, its gradient, and how near to Best-of-n it comes to rest."""

import itertools

import pytest
import torch

from bondlm.bestofn import best_of_n_probs, kl_bound, kl_divergence
from bondlm.bestofn.oracle.listwise import listwise_fixed_point
from bondlm.objectives import Listwise

from .tables import ANCHOR, REWARDS


@pytest.mark.parametrize("rewards", [[0.2, 3.0, -1.0, 0.7], [1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_weights_are_how_often_best_of_n_of_the_samples_returns_each(rewards: list[float], n: int) -> None:
    """All 4^n draws with replacement; where several are best, each takes an equal part."""
    expected = torch.zeros(4, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=n):
        best = [i for i in range(4) if rewards[i] == max(rewards[j] for j in drawn)]
        expected[best] += 1 / len(best) / 4**n
    weights = Listwise(n=n, num_samples=4).select(torch.tensor([rewards]), torch.zeros(1, 4)).signal_PC[0]
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


def test_the_gradient_is_the_samples_softmax_minus_the_weights() -> None:
    objective = Listwise(n=2, num_samples=3)
    logp = torch.tensor([[-1.0, -2.5, -0.3]], dtype=torch.float64, requires_grad=True)
    anchor_logp, weights = torch.tensor([[-1.4, -2.0, -0.1]]).double(), torch.tensor([[1.0, 5.0, 3.0]]).double() / 9
    loss = objective.loss(logp, anchor_logp, weights, torch.zeros(1, 3))
    (gradient,) = torch.autograd.grad(loss.loss_P.sum(), logp)
    share = (logp - anchor_logp).detach().softmax(1)
    torch.testing.assert_close(gradient, share - weights, rtol=1e-12, atol=1e-15)
    kl = float((weights * (weights / share).log()).sum())
    assert float(loss.metrics["bond/listwise_kl"]) == pytest.approx(kl)


def test_all_tied_teaches_nothing_at_the_anchor() -> None:
    objective, logp = Listwise(n=4, num_samples=4), torch.full((1, 4), -1.0, dtype=torch.float64, requires_grad=True)
    weights = objective.select(torch.ones(1, 4), torch.zeros(1, 4)).signal_PC
    loss = objective.loss(logp, logp.detach(), weights, torch.zeros(1, 4))
    (gradient,) = torch.autograd.grad(loss.loss_P.sum(), logp)
    assert float(gradient.abs().max()) < 1e-15
    assert float(loss.metrics["bond/frac_no_signal"]) == 1.0


def test_more_samples_come_nearer_to_best_of_n() -> None:
    best = best_of_n_probs(ANCHOR, REWARDS, 2)
    off = [float(kl_divergence(best, listwise_fixed_point(ANCHOR, REWARDS, 2, m)).max()) for m in (4, 8, 16)]
    assert off[0] > off[1] > off[2]
    assert off[2] < 2e-3


@pytest.mark.parametrize(
    ("n", "num_samples", "reached", "ratio"),
    [(2, 4, 1.96, 0.91), (2, 8, 1.96, 0.94), (4, 4, 4.23, 0.98), (4, 8, 3.85, 0.98), (8, 8, 8.31, 1.0)],
)
def test_where_it_rests_with_continuous_rewards(n: int, num_samples: int, reached: float, ratio: float) -> None:
    """The table in docs/theory.md: 200 answers of equal probability, descent on 40,000 draws at once."""
    generator = torch.Generator().manual_seed(0)
    drawn_DM = (torch.rand(40_000, num_samples, generator=generator) * 200).long()
    weights_DM = Listwise(n=n, num_samples=num_samples).select(drawn_DM, torch.zeros(1)).signal_PC
    quantiles = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    log_ratio = ((n - 1) * quantiles.log()).requires_grad_()
    optimizer = torch.optim.LBFGS([log_ratio], max_iter=100, line_search_fn="strong_wolfe")

    def descend() -> float:
        optimizer.zero_grad()
        loss = -(weights_DM * log_ratio[drawn_DM].log_softmax(1)).sum(1).mean()
        loss.backward()
        return float(loss.detach())

    optimizer.step(descend)
    policy = log_ratio.detach().softmax(0)
    win_rate = float((policy * quantiles).sum())
    order = win_rate / (1 - win_rate)
    assert order == pytest.approx(reached, rel=0.02)
    kl = float((policy * (200 * policy).log()).sum())
    assert kl / kl_bound(order) == pytest.approx(ratio, abs=0.015)


@pytest.mark.parametrize(
    ("n", "reached"), [(2, [2.13, 2.11, 2.02, 1.93]), (4, [4.70, 4.49, 3.75, 3.34]), (8, [10.95, 9.48, 6.26, 5.22])]
)
def test_where_it_rests_with_rewards_of_0_and_1(n: int, reached: list[float]) -> None:
    """The other table in docs/theory.md, eight samples."""
    pass_rate = torch.tensor([0.05, 0.1, 0.36, 0.6], dtype=torch.float64)
    anchor = torch.stack([1 - pass_rate, pass_rate], dim=1)
    policy = listwise_fixed_point(anchor, torch.tensor([[0.0, 1.0]]).expand(4, -1), n, 8)
    orders = policy[:, 0].log() / anchor[:, 0].log()
    torch.testing.assert_close(orders, torch.tensor(reached, dtype=torch.float64), rtol=5e-3, atol=0)


def test_a_weight_that_rounds_to_nothing_leaves_the_kl_finite():
    """Best-of-32 of 32 samples: the worst weighs 32^-32, which is 0 in fp32; a policy at the weights has KL 0."""
    objective = Listwise(n=32, num_samples=32)
    signal = objective.select(torch.arange(32.0)[None], torch.zeros(1, 32)).signal_PC.float()
    assert signal.min() == 0
    logp = signal.clamp(min=1e-30).log()
    at_them, elsewhere = (objective.loss(x, torch.zeros(1, 32), signal, torch.zeros(1, 32)) for x in (logp, 0 * logp))
    assert float(at_them.metrics["bond/listwise_kl"]) == pytest.approx(0.0, abs=1e-5)
    assert float(elsewhere.metrics["bond/listwise_kl"]) > 1.0
