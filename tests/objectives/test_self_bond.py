"""Own-quantile BOND: its fixed points, from anywhere; ties and 0/1 rewards; what the baseline does to ranks."""

import math

import pytest
import torch

from bondlm.bestofn import (
    best_of_n_probs,
    kl_bound,
    kl_divergence,
    self_bond_fixed_point,
    self_bond_gradient,
    self_bond_signal,
)
from bondlm.bestofn.own_quantiles import FORMS, kl_over_best_of_n, signal_table, tilt_of_order, win_table
from bondlm.errors import ConfigError
from bondlm.objectives import RLOO, SelfBOND

from .tables import ANCHOR, LOGITS, REWARDS, draw, loss_on

every_form = pytest.mark.parametrize("form", FORMS)
PASS_RATES = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7], dtype=torch.float64)


def equal_outcomes(count):
    """(count,) reference probabilities and rewards: as near to continuous rewards as a table comes."""
    return torch.full((count,), 1 / count, dtype=torch.float64), torch.arange(count, dtype=torch.float64)


def right_and_wrong(pass_rates):
    """One prompt a row: the reference's probabilities of a wrong and of a right answer, and their 0/1 rewards."""
    return torch.stack([1 - pass_rates, pass_rates], 1), torch.tensor([0.0, 1.0]).double().expand(len(pass_rates), 2)


# -- fixed points


@every_form
@pytest.mark.parametrize(("n", "num_samples"), [(2, 4), (4, 8), (8, 8)])
def test_the_fixed_point_wins_as_best_of_n_does(n, num_samples, form):
    """The n that is wanted and the KL that it costs, on 300 outcomes."""
    ref, rewards = equal_outcomes(300)
    reached = self_bond_fixed_point(ref, rewards, n, num_samples, form)
    win_rate = float((reached * (torch.arange(300) + 0.5) / 300).sum())
    assert win_rate / (1 - win_rate) == pytest.approx(n, rel=2e-3)
    ratio = float(kl_divergence(reached, ref)) / kl_bound(n)
    assert ratio == pytest.approx(kl_over_best_of_n(n, num_samples, form), rel=2e-3)


@every_form
@pytest.mark.parametrize("start", ["reference", "worst", "anything"])
@pytest.mark.parametrize("natural", [True, False], ids=["natural gradient", "plain gradient"])
def test_exact_descent_reaches_it_from_anywhere(natural, start, form):
    far = 3 if natural else 1  # a plain gradient hardly moves what has lost its probability
    tables = [(ANCHOR, REWARDS, 3, 4), (*right_and_wrong(PASS_RATES[2:5]), 4, 6)]
    for ref, rewards, n, num_samples in tables:
        target = self_bond_fixed_point(ref, rewards, n, num_samples, form)
        generator = torch.Generator().manual_seed(0)
        noise = far * torch.randn(ref.shape, generator=generator, dtype=torch.float64)
        logits = {"reference": ref.log(), "worst": ref.log() - far * rewards, "anything": noise}[start]
        momentum = torch.zeros_like(logits)
        for _ in range(200 if natural else 8000):
            gradient = self_bond_gradient(logits, ref, rewards, n, num_samples, form)
            momentum = 0.9 * momentum + gradient
            logits = logits - (gradient / logits.softmax(-1) / 4 if natural else momentum / 4)
            if float(gradient.abs().max()) < 1e-8:
                break
        assert float(kl_divergence(target, logits.softmax(-1)).max()) < 1e-6


@every_form
@pytest.mark.parametrize(("n", "num_samples"), [(8, 8), (10, 3), (20, 8)])
def test_it_is_stable(n, num_samples, form):
    """Natural-gradient flow near the fixed point: every eigenvalue has a negative real part, at bold orders too."""
    ref, rewards = equal_outcomes(40)
    target = self_bond_fixed_point(ref, rewards, n, num_samples, form)

    def flow(log_probs):
        return self_bond_signal(log_probs.softmax(-1), rewards, n, num_samples, form) - (log_probs - ref.log())

    jacobian = torch.autograd.functional.jacobian(flow, target.log())
    assert float(torch.linalg.eigvals(jacobian).real.max()) < -0.3


@pytest.mark.parametrize("n", [2, 4, 16])
def test_without_estimates_it_is_best_of_n_or_the_tilt_with_ties(n):
    expected = best_of_n_probs(ANCHOR, REWARDS, n)
    torch.testing.assert_close(
        self_bond_fixed_point(ANCHOR, REWARDS, n, None, "best_of_n"), expected, rtol=1e-8, atol=1e-12
    )
    tilt, order = tilt_of_order(n), REWARDS[0].argsort()
    ends = torch.nn.functional.pad(ANCHOR[0][order].cumsum(0), (1, 0))
    mass = (tilt * ends).exp().diff()
    reached = self_bond_fixed_point(ANCHOR[0], REWARDS[0], n, None, "tilt")
    torch.testing.assert_close(reached[order], mass / mass.sum(), rtol=1e-8, atol=1e-12)


# -- ties


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_rewards_of_0_and_1_without_estimates(n):
    """Descent on one prompt ends at the pass rate of Best-of-n."""
    ref, rewards = right_and_wrong(PASS_RATES)
    expected = 1 - (1 - PASS_RATES) ** n
    for form in ("best_of_n", "harmonic"):
        reached = self_bond_fixed_point(ref, rewards, n, None, form)
        torch.testing.assert_close(reached[:, 1], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("form", "n", "off"), [("best_of_n", 2, 0.012), ("best_of_n", 4, 0.045), ("tilt", 2, 0.04), ("tilt", 4, 0.075)]
)
def test_rewards_of_0_and_1_with_8_samples(form, n, off):
    """The pass rate that is reached, against Best-of-n's; see the table in docs/theory.md."""
    reached = self_bond_fixed_point(*right_and_wrong(PASS_RATES), n, 8, form)[:, 1]
    assert float((reached - (1 - (1 - PASS_RATES) ** n)).abs().max()) < off
    assert bool((reached > PASS_RATES).all())


@every_form
def test_what_all_samples_share_teaches_nothing(form):
    """All tied, P = 0 or P = 1 among the samples: no signal, and at the reference no gradient at all."""
    objective = SelfBOND(n=4, num_samples=5, log_quantile=form)
    rewards = torch.tensor([[0.0] * 5, [1.0] * 5, [0.0, 1, 1, 0, 0]], dtype=torch.float64)
    signal = objective.select(rewards, torch.zeros_like(rewards)).signal_PC
    logp = torch.full((3, 5), -2.0, dtype=torch.float64, requires_grad=True)
    baseline = objective.baseline(objective.returns(signal, logp.detach(), logp.detach()))
    loss = objective.loss(logp, logp.detach(), signal, baseline)
    (gradient,) = torch.autograd.grad(loss.loss_P.sum(), logp)
    torch.testing.assert_close(gradient[:2], torch.zeros(2, 5).double(), rtol=0, atol=1e-15)
    assert bool((gradient[2] * torch.tensor([1, -1, -1, 1, 1]) > 0.01).all())
    assert loss.metrics["bond/frac_no_signal"].tolist() == [1, 1, 0]


@every_form
def test_tied_samples_share_one_signal_between_those_of_their_places(form):
    objective = SelfBOND(n=4, num_samples=4, log_quantile=form)
    rewards = torch.tensor([[1.0, 2, 3, 4], [1.0, 2, 2, 4], [1, 1, 2, 2]], dtype=torch.float64)
    apart, tied, pairs = objective.select(rewards, torch.zeros_like(rewards)).signal_PC
    assert tied[1] == tied[2]
    assert apart[1] < tied[1] < apart[2]
    assert (tied[0], tied[3]) == (apart[0], apart[3])
    assert apart[0] < pairs[0] == pairs[1] < apart[1] < apart[2] < pairs[2] == pairs[3] < apart[3]


# -- the sampled objective


@every_form
def test_the_advantage_is_the_signal_less_the_mean_of_all(form):
    """Not K/(K-1) of it, which RLOO's baseline alone would make of ranks."""
    objective = SelfBOND(n=4, num_samples=6, log_quantile=form)
    rewards = torch.tensor([[3.0, 1, 2, 2, 5, 0]], dtype=torch.float64)
    table = torch.tensor(signal_table(4, 6, form))
    signal = table[torch.tensor([4, 1, 2, 2, 5, 0]), torch.tensor([0, 0, 1, 1, 0, 0])]
    logp = torch.tensor([[-1.0, -2, -3, -4, -5, -6]], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([[-1.5, -1, -2, -3.5, -7, -6]], dtype=torch.float64)
    chosen = objective.select(rewards, torch.zeros_like(rewards))
    baseline = objective.baseline(objective.returns(chosen.signal_PC, logp.detach(), ref_logp))
    loss = objective.loss(logp, ref_logp, chosen.signal_PC, baseline).loss_P
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    log_ratio = (logp.detach() - ref_logp)[0]
    of_the_kl = log_ratio - (log_ratio.sum() - log_ratio) / 5
    torch.testing.assert_close(gradient[0], -(signal - signal.mean() - of_the_kl) / 6, rtol=1e-12, atol=1e-14)


def test_without_a_signal_it_is_rloo():
    """All rewards tied: RLOO with beta_rl = 1 and no reward."""
    logp, ref_logp = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    objective, rloo = SelfBOND(n=2, num_samples=4), RLOO(beta_rl=1.0, num_samples=4)
    assert objective.plan == rloo.plan
    signal = objective.select(torch.zeros(3, 4), torch.zeros(3, 4)).signal_PC
    losses = []
    for each, own in ((objective, signal), (rloo, torch.zeros(3, 4).double())):
        baseline = each.baseline(each.returns(own, logp, ref_logp))
        losses.append(each.loss(logp, ref_logp, own, baseline).loss_P)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)


@every_form
def test_the_order_of_the_samples_does_not_matter(form):
    objective, shuffled = SelfBOND(n=3, num_samples=5, log_quantile=form), torch.tensor([4, 2, 0, 3, 1])
    generator = torch.Generator().manual_seed(0)
    logits, ref, rewards = (table.repeat(20, 1) for table in (LOGITS, ANCHOR, REWARDS))
    outcomes, noise = draw(objective.plan, logits, ref, generator)
    loss = loss_on(objective, outcomes, noise, logits, ref, rewards).loss_P
    again = loss_on(objective, outcomes[:, shuffled], noise, logits, ref, rewards).loss_P
    torch.testing.assert_close(loss, again, rtol=1e-13, atol=1e-14)
    signal = objective.select(rewards.gather(1, outcomes), noise).signal_PC
    moved = objective.select(rewards.gather(1, outcomes[:, shuffled]), noise).signal_PC
    assert torch.equal(moved, signal[:, shuffled])


def test_descent_on_samples_comes_close_to_the_fixed_point_and_to_the_wanted_n():
    """The real loop, on 24 outcomes: the N that its win rate is worth is the one that was asked for."""
    objective, generator = SelfBOND(n=4), torch.Generator().manual_seed(0)
    ref, rewards = equal_outcomes(24)
    rows, logits = 256, ref.log()
    for step in range(400):
        leaf = logits.clone().requires_grad_()
        tables = [table.expand(rows, -1) for table in (leaf, ref, rewards)]
        outcomes, noise = draw(objective.plan, tables[0].detach(), tables[1], generator)
        loss_on(objective, outcomes, noise, *tables).loss_P.mean().backward()
        logits = logits - (4.0 if step < 300 else 1.0) * leaf.grad
    target = self_bond_fixed_point(ref, rewards, 4, 8)
    assert float(kl_divergence(target, logits.softmax(-1))) < 0.01
    win_rate = float((logits.softmax(-1) * (rewards + 0.5) / 24).sum())
    assert win_rate / (1 - win_rate) == pytest.approx(4, abs=0.3)


# -- refused settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 1}, "n=1"),
        ({"n": 2, "num_samples": 2}, "num_samples=2"),
        ({"n": 2, "log_quantile": "clamped"}, "log_quantile='clamped'"),
        ({"n": 100}, r"n=100: .* use n <= 59"),
        ({"n": 30, "log_quantile": "harmonic"}, r"n=30: .* use n <= 23"),
        ({"n": 10**6, "num_samples": 3}, r"n=1000000: .* use n <= 15"),
    ],
)
def test_settings_that_no_fixed_point_serves_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SelfBOND(**settings)


def test_the_strength_is_there_to_be_logged():
    assert SelfBOND(n=8).strength == pytest.approx(5.50, abs=5e-3)
    assert SelfBOND(n=8, log_quantile="harmonic").strength == pytest.approx(2.354, abs=5e-4)
    assert SelfBOND(n=8, log_quantile="best_of_n").strength == pytest.approx(1.578, abs=5e-4)
    assert math.isclose(SelfBOND(n=2).strength, SelfBOND(n=2, num_samples=8).strength)


def test_the_objective_counts_them_against_its_last_sample() -> None:
    """Permuting own samples changes nothing; what ranks is the policy's samples among themselves."""
    objective = SelfBOND(n=4, num_samples=4, adaptive_strength=True)
    rewards = torch.tensor([[0.1, 0.7, 0.3, 0.9, 0.5], [1.0, 0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    noise = torch.zeros(3, 5)
    selection = objective.select(rewards, noise)
    assert selection.wins_P is not None
    assert selection.wins_P.tolist() == pytest.approx([0.5, float(win_table(4, 4)[1, 3]), 0.0])
    plain = SelfBOND(n=4, num_samples=4).select(rewards[:, :4], noise[:, :4])
    assert torch.equal(selection.signal_PC, plain.signal_PC)
    assert torch.equal(selection.rows_PL, plain.rows_PL)
    turned = objective.select(rewards[:, [2, 0, 3, 1, 4]], noise)
    assert turned.wins_P is not None
    assert torch.equal(turned.wins_P, selection.wins_P)
