"""Limits, kinships, invariances, edge cases and refused settings of the whole family."""

import math

import pytest
import torch

from bondlm.bestofn import kl_divergence, log_quantile
from bondlm.errors import ConfigError
from bondlm.objectives import BOND, GRPO, JBOND, RLOO, VBON, BestOfNRegression, BestOfNSFT, BoNBoN, Listwise, Reinforce
from bondlm.objectives.terms import argmax_random_ties, leave_one_out_mean

from .tables import ANCHOR, LOGITS, OBJECTIVES, REWARDS, draw, exact_fixed_point, loss_on

every_objective = pytest.mark.parametrize("name", OBJECTIVES)
RANK_BASED = [name for name, objective in OBJECTIVES.items() if not isinstance(objective, Reinforce | RLOO | GRPO)]
INCREASING = {
    "affine": lambda r: 3 * r + 7,
    "exp": torch.exp,
    "cube": lambda r: r**3 - 100,
    "tiny": lambda r: 1e-9 * r,
}


def drawn(objective, rows=40, seed=0):
    """Outcomes, noise and the tables of a batch of different prompts."""
    generator = torch.Generator().manual_seed(seed)
    logits, anchor, rewards = (table.repeat(rows, 1) for table in (LOGITS, ANCHOR, REWARDS))
    return *draw(objective.plan, logits, anchor, generator), logits, anchor, rewards


def loss_and_gradient(objective, outcomes, noise, logits, anchor, rewards):
    leaf = logits.clone().requires_grad_()
    loss = loss_on(objective, outcomes, noise, leaf, anchor, rewards)
    return loss.loss_P.detach(), torch.autograd.grad(loss.loss_P.sum(), leaf)[0]


# -- limits and kinships


def old_jbond_loss(rewards, noise, logp, anchor_logp, beta, gamma):
    """Algorithm 2 written once more, from raw draws to the loss."""
    best = 1 + argmax_random_ties(rewards[:, 1:], noise[:, 1:])
    below = rewards[:, :1] < rewards[:, 1:].amin(1, keepdim=True)
    signal = below.double() * -math.ldexp(math.log(2.0), 2)
    own, winner = logp[:, 0], logp.gather(1, best[:, None])[:, 0]
    baseline = leave_one_out_mean(signal - (own[:, None].detach() - anchor_logp[:, :1]))
    log_ratio = own.detach() - anchor_logp[:, 0]
    advantage = signal[:, 0] - log_ratio - baseline[:, 0]
    return (1 - beta) * -winner + beta * (-own * advantage) + gamma * (own * log_ratio)


@pytest.mark.parametrize(("beta", "gamma"), [(0.5, 0.0), (0.3, 1.0)])
def test_jbond_with_two_samples_is_algorithm_2_to_the_bit(beta, gamma):
    objective = JBOND(beta=beta, gamma=gamma)
    outcomes, noise, logits, anchor, rewards = drawn(objective)
    leaf = logits.clone().requires_grad_()
    expected = old_jbond_loss(
        rewards.gather(1, outcomes),
        noise,
        leaf.log_softmax(-1).gather(1, outcomes),
        anchor.log().gather(1, outcomes),
        beta,
        gamma,
    )
    loss, gradient = loss_and_gradient(objective, outcomes, noise, logits, anchor, rewards)
    assert torch.equal(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("k", [2, 5])
def test_bond_and_jbond_share_their_loss(k):
    """n = 2 and the harmonic log-quantile: the same selection, signal, loss and gradient, to the bit."""
    jbond = JBOND(beta=0.3, gamma=0.6, num_anchor_samples=k, log_quantile="harmonic")
    bond = BOND(n=2, beta=0.3, gamma=0.6, num_anchor_samples=k, log_quantile="harmonic")
    assert jbond.plan == bond.plan
    case = drawn(jbond)
    for one, other in zip(loss_and_gradient(jbond, *case), loss_and_gradient(bond, *case), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("n", "k"), [(3, 3), (4, 2)])
def test_bond_with_beta_zero_is_best_of_n_fine_tuning(n, k):
    bond, sft = BOND(n=n, beta=0.0, num_anchor_samples=k), BestOfNSFT(n=n)
    outcomes, noise, *tables = drawn(bond)
    expected = loss_and_gradient(sft, outcomes[:, 1 : 1 + n], noise[:, 1 : 1 + n], *tables)
    for one, other in zip(loss_and_gradient(bond, outcomes, noise, *tables), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-15, atol=0)


def test_vbon_is_the_backward_half_of_bond_with_another_estimate():
    vbon, bond = VBON(n=5, num_anchor_samples=3), BOND(n=5, beta=1.0, num_anchor_samples=3)
    logp = torch.tensor([[-1.0], [-2.5]], dtype=torch.float64)
    anchor_logp, signal = logp - 0.3, torch.tensor([[-1.0], [-0.2]], dtype=torch.float64)
    with_best = torch.cat([logp, torch.full_like(logp, -7.0)], 1)
    baseline = vbon.baseline(vbon.returns(signal, logp, anchor_logp))
    assert torch.equal(baseline, bond.baseline(bond.returns(signal, logp, anchor_logp)))
    assert torch.equal(
        vbon.loss(logp, anchor_logp, signal, baseline).loss_P,
        bond.loss(with_best, anchor_logp, signal, baseline).loss_P,
    )
    rewards = torch.tensor([[0.5, 0.1, 0.2, 0.9]], dtype=torch.float64)
    assert vbon.select(rewards, torch.zeros_like(rewards)).signal_PC.item() == pytest.approx(4 * math.log(3 / 4))


def test_vbon_approaches_bond_where_nothing_ties():
    anchor = torch.full((256,), 1 / 256, dtype=torch.float64)
    rewards = torch.arange(256.0, dtype=torch.float64)
    distances = [
        float(
            kl_divergence(
                exact_fixed_point(VBON(n=4, num_anchor_samples=m), anchor, rewards),
                exact_fixed_point(BOND(n=4, beta=1.0, num_anchor_samples=m), anchor, rewards),
            )
        )
        for m in (4, 16, 64)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 2e-4


def test_reinforce_and_rloo_have_one_objective():
    """Two samples as a prompt of RLOO, or as a batch of REINFORCE with one prompt: the same mean loss."""
    rewards = torch.tensor([[0.2, 1.5]], dtype=torch.float64)
    logp = torch.tensor([[-1.0, -3.0]], dtype=torch.float64)
    anchor_logp = torch.tensor([[-1.5, -2.0]], dtype=torch.float64)
    rloo, reinforce = RLOO(beta_rl=0.3), Reinforce(beta_rl=0.3)
    together = rloo.loss(logp, anchor_logp, rewards, rloo.baseline(rloo.returns(rewards, logp, anchor_logp))).loss_P
    column = [tensor.T for tensor in (logp, anchor_logp, rewards)]
    baseline = reinforce.baseline(reinforce.returns(column[2], column[0], column[1]))
    torch.testing.assert_close(reinforce.loss(*column, baseline).loss_P.mean(), together[0], rtol=1e-14, atol=0)


def test_grpo_by_hand():
    """Two prompts: rewards apart, with mean and Bessel's std of the prompt alone; and all tied."""
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    logp, anchor_logp = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    std = math.sqrt((2.0**2 + 1.0**2 + 3.0**2) / 2)
    for scale, divisor in (("none", 1.0), ("group", std + 1e-4)):
        grpo = GRPO(beta_rl=0.7, num_samples=3, scale_rewards=scale)
        signal = grpo.select(rewards, torch.rand_like(rewards)).signal_PC
        assert float(signal.sum().abs()) < 1e-15  # the mean is off before the trainer rounds to fp32
        returns = grpo.returns(signal, logp, anchor_logp)
        advantage = returns - grpo.baseline(returns)
        expected = torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64) / divisor
        torch.testing.assert_close(advantage, expected, rtol=1e-14, atol=1e-15)
        metrics = grpo.loss(logp, anchor_logp, signal, grpo.baseline(returns)).metrics
        assert metrics["bond/frac_no_signal"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "objective",
    [
        RLOO(beta_rl=0.7, num_samples=3),
        GRPO(beta_rl=0.7, num_samples=3, scale_rewards="group"),
        GRPO(beta_rl=0.7, num_samples=3, scale_rewards="none"),
    ],
)
def test_the_prompts_whose_samples_all_tie_are_counted_whatever_their_reward(objective):
    """Three times 0.1 has another mean than 0.1."""
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.5], [0.1, 0.1, 0.1]], dtype=torch.float64)
    assert (rewards - rewards.mean(dim=1, keepdim=True))[2].any()
    signal, logp = objective.select(rewards, torch.rand_like(rewards)).signal_PC.float(), torch.zeros(3, 3)
    metrics = objective.loss(logp, logp, signal, torch.zeros(3, 3)).metrics
    assert metrics["bond/frac_no_signal"].tolist() == [0.0, 1.0, 1.0]


def test_grpo_without_std_is_rloo_with_a_smaller_reward():
    """(m-1)/m of the reward, to the bit of rounding: the mean that is taken off has the sample itself in it."""
    grpo, rloo = GRPO(beta_rl=0.3, num_samples=4, scale_rewards="none"), RLOO(beta_rl=0.3, num_samples=4)
    *case, rewards = drawn(grpo)
    expected = loss_and_gradient(rloo, *case, 0.75 * rewards)
    for one, other in zip(loss_and_gradient(grpo, *case, rewards), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_grpo_forgets_the_scale_of_a_prompts_rewards_and_a_pair_keeps_the_order_alone():
    outcomes, noise, logits, anchor, rewards = drawn(GRPO(beta_rl=0.0))
    _, expected = loss_and_gradient(GRPO(beta_rl=0.0), outcomes, noise, logits, anchor, 1e6 * rewards)
    _, moved = loss_and_gradient(GRPO(beta_rl=0.0), outcomes, noise, logits, anchor, 3e6 * rewards + 1e7)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
    pair = GRPO(beta_rl=0.0, num_samples=2)
    signal = pair.select(torch.tensor([[0.0, 10.0], [3.0, -1e6]]).double(), torch.rand(2, 2)).signal_PC
    half = math.sqrt(0.5) / 2
    torch.testing.assert_close(signal, torch.tensor([[-half, half], [half, -half]]).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("objective", [Reinforce(beta_rl=0.0), RLOO(beta_rl=0.0)])
def test_reward_baselines_depend_on_the_rewards_scale_alone(objective):
    case = drawn(objective)
    _, gradient = loss_and_gradient(objective, *case)
    *rest, rewards = case
    _, moved = loss_and_gradient(objective, *rest, 4 * rewards + 100)
    torch.testing.assert_close(moved, 4 * gradient, rtol=1e-9, atol=1e-9)


def test_the_regression_target_by_hand():
    """Three samples, n = 3: 2 log u + log B, u among the two others, harmonic; B = 3 without ties."""
    rewards = torch.tensor([[1.0, 3.0, 2.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    selection = BestOfNRegression(n=3, num_samples=3).select(rewards, torch.zeros_like(rewards))
    assert selection.rows_PL.tolist() == [[0, 1, 2], [0, 1, 2]]
    log3 = math.log(3)
    tied = math.log(1 + 1 / 2 + 1 / 4)  # both others reached, one of them tied: u = 1, p_</p_<= = 1/2
    expected = [[2 * -1.5 + log3, log3, 2 * -0.5 + log3], [tied, tied, 2 * -1.5 + log3]]
    torch.testing.assert_close(selection.signal_PC, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)


def test_the_regression_gradient_is_bonds_backward_gradient_on_the_same_samples():
    """Half a squared error in nats: a sample is pushed by (t - h), as REINFORCE pushes by the return."""
    regression = BestOfNRegression(n=3, num_samples=3)
    logp = torch.tensor([[-1.0, -2.0, -1.5]], dtype=torch.float64, requires_grad=True)
    anchor_logp, target = torch.tensor([[-1.2, -1.0, -3.0]]).double(), torch.tensor([[0.5, -1.0, 1.1]]).double()
    loss = regression.loss(logp, anchor_logp, target, torch.zeros_like(target)).loss_P
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    returns = BOND(n=3).returns(target, logp.detach(), anchor_logp)
    torch.testing.assert_close(gradient, -returns / 3, rtol=1e-14, atol=0)


def test_the_order_of_logged_samples_does_not_matter():
    objective, shuffled = BestOfNRegression(n=3, num_samples=4), torch.tensor([2, 0, 3, 1])
    outcomes, noise, *tables = drawn(objective)
    loss, gradient = loss_and_gradient(objective, outcomes, noise, *tables)
    again = loss_and_gradient(objective, outcomes[:, shuffled], noise[:, shuffled], *tables)
    torch.testing.assert_close(loss, again[0], rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(gradient, again[1], rtol=1e-13, atol=1e-15)


# -- invariance


@pytest.mark.parametrize("increasing", INCREASING.values(), ids=INCREASING.keys())
@pytest.mark.parametrize("name", RANK_BASED)
def test_an_increasing_map_of_the_rewards_changes_no_bit(name, increasing):
    objective = OBJECTIVES[name]
    outcomes, noise, logits, anchor, rewards = drawn(objective)
    expected = loss_and_gradient(objective, outcomes, noise, logits, anchor, rewards)
    mapped = loss_and_gradient(objective, outcomes, noise, logits, anchor, increasing(rewards))
    decreasing = loss_and_gradient(objective, outcomes, noise, logits, anchor, -rewards)
    for one, other, third in zip(expected, mapped, decreasing, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, third)


# -- edges


@every_objective
@pytest.mark.parametrize("case", ["policy below all", "policy above all", "all tied", "huge log-ratios"])
def test_loss_and_gradient_are_finite_at_the_edges(name, case):
    objective = OBJECTIVES[name]
    plan = objective.plan
    rewards = torch.linspace(0, 1, plan.total, dtype=torch.float64).expand(3, -1).clone()
    if case == "policy below all":
        rewards[:, : plan.policy] = -1e300
    if case == "policy above all":
        rewards[:, : plan.policy] = 10.0
    if case == "all tied":
        rewards[:] = 0.0
    scale = 1e4 if case == "huge log-ratios" else 1.0
    logp = -scale * (1 + torch.arange(3.0 * plan.learn, dtype=torch.float64)).view(3, -1)
    logp.requires_grad_()
    anchor_logp = torch.full((3, plan.compare), -2.0, dtype=torch.float64)
    selection = objective.select(rewards, torch.rand_like(rewards))
    returns = objective.returns(selection.signal_PC, logp[:, : plan.compare].detach(), anchor_logp)
    loss = objective.loss(logp, anchor_logp, selection.signal_PC, objective.baseline(returns))
    (gradient,) = torch.autograd.grad(loss.loss_P.sum(), logp)
    assert bool(selection.signal_PC.isfinite().all())
    assert bool(loss.loss_P.isfinite().all())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("n", [2, 64, 1000])
def test_large_orders_stay_finite(n):
    rewards = torch.cat([torch.full((2, 1), -1.0), torch.zeros(2, max(n, 4))], 1).double()
    for objective in (
        BOND(n=n, num_anchor_samples=4, correction=True),
        BOND(n=n, num_anchor_samples=4, log_quantile="harmonic"),
        VBON(n=n, num_anchor_samples=4),
    ):
        signal = objective.select(rewards[:, : objective.plan.total], torch.zeros(2, objective.plan.total)).signal_PC
        assert bool(signal.isfinite().all())
        assert float(signal.max()) < 0


def test_bond_signals_by_hand():
    """y ties with one of four, is above one: p_ = 1/2; the collision term is 1 + 1/2 + 1/4."""
    rewards = torch.tensor([[1.0, 0.0, 1.0, 2.0, 3.0], [-1.0, 0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    noise = torch.zeros_like(rewards)
    clamped = BOND(n=3, num_anchor_samples=4, correction=True).select(rewards, noise)
    assert clamped.rows_PL.tolist() == [[0, 3], [0, 3]]  # best of the first three, not of all four
    expected = [2 * math.log(1 / 2) + math.log(1.75), 2 * math.log(1 / 8) + math.log(3)]  # below all: 1/(2k), no tie
    torch.testing.assert_close(clamped.signal_PC[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    harmonic = BOND(n=3, num_anchor_samples=4, log_quantile="harmonic").select(rewards, noise).signal_PC
    torch.testing.assert_close(harmonic, 2 * log_quantile(rewards[:, :1], rewards[:, 1:], "harmonic"))


def test_a_learned_quantile_is_labelled_by_comparisons_and_replaces_the_estimate():
    """App. B.1: the label is 1{r(y') <= r(y)}, ties included; its mean is p_<=, so the return is Eq. 15's."""
    learned = BOND(n=3, quantile="learned", num_anchor_samples=2)
    rewards = torch.tensor([[2.0, 1.0, 2.0, 5.0], [0.0, 1.0, 2.0, -1.0], [3.0, 4.0, 2.0, 9.0]])
    assert learned.labels(rewards).tolist() == [1.0, 0.0, 0.5]  # the third anchor sample is not asked
    plan = learned.plan
    assert (plan.policy, plan.anchor, plan.learn, plan.compare) == (1, 3, 2, 1)
    chosen = learned.select(rewards, torch.rand(3, 4))
    assert chosen.rows_PL.tolist() == [[0, 3], [0, 2], [0, 3]]
    sampled = BOND(n=3, num_anchor_samples=3)
    noise = torch.rand(3, 4)
    log_p = torch.log(torch.tensor([[2 / 3], [1 / 3], [1 / 3]]))
    torch.testing.assert_close(
        learned.signal(log_p), sampled.select(rewards, noise).signal_PC.to(log_p.dtype), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    "objective", [BestOfNSFT(n=3), BoNBoN(n=3), BestOfNRegression(n=3, num_samples=3), Listwise(n=3, num_samples=3)]
)
def test_offline_objectives_draw_nothing_and_have_no_baseline(objective):
    assert objective.plan.policy == 0
    signal = objective.select(torch.rand(5, 3), torch.rand(5, 3)).signal_PC
    assert signal.shape == (5, objective.plan.compare)
    returns = objective.returns(signal, torch.ones_like(signal), torch.zeros_like(signal))
    assert not returns.any()
    assert not objective.baseline(returns).any()
    assert objective.baseline(returns).shape == signal.shape


@every_objective
def test_shapes_and_metrics(name):
    objective = OBJECTIVES[name]
    plan = objective.plan
    outcomes, noise, logits, anchor, rewards = drawn(objective, rows=2)
    assert outcomes.shape[1] == plan.total
    selection = objective.select(rewards.gather(1, outcomes), noise)
    assert selection.rows_PL.shape == (6, plan.learn)
    assert selection.rows_PL.dtype == torch.long
    assert selection.signal_PC.shape == (6, plan.compare)
    loss = loss_on(objective, outcomes, noise, logits.requires_grad_(), anchor, rewards)
    assert loss.loss_P.shape == (6,)
    for value in loss.metrics.values():
        assert value.shape == (6,)
        assert not value.requires_grad


def test_bonbon_takes_two_different_samples_where_all_tie():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3000, 3, generator=generator, dtype=torch.float64)
    rows = BoNBoN(n=3).select(torch.zeros(3000, 3), noise).rows_PL
    assert bool((rows[:, 0] != rows[:, 1]).all())
    counts = (3 * rows[:, 0] + rows[:, 1]).bincount(minlength=9).double()
    assert float(counts[[1, 2, 3, 5, 6, 7]].min()) > 400  # each ordered pair: 500 in the mean


# -- refused settings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: JBOND(beta=1.1), r"beta=1\.1: .*\[0, 1\]"),
        (lambda: JBOND(beta=math.nan), "beta=nan"),
        (lambda: JBOND(gamma=-1.0), r"gamma=-1\.0: .*>= 0"),
        (lambda: JBOND(gamma=math.inf), "gamma=inf"),
        (lambda: JBOND(num_anchor_samples=1), "num_anchor_samples=1: .*>= 2"),
        (lambda: JBOND(num_anchor_samples=16), "num_anchor_samples=16: .*-4.54e.04 nats.*log_quantile: harmonic"),
        (lambda: JBOND(log_quantile="clamped"), "log_quantile='clamped': .*jbond, harmonic"),
        (lambda: BOND(n=1), "n=1: .*>= 2"),
        (lambda: BOND(n=2.5), "n=2.5"),
        (lambda: BOND(n=4, beta=-0.1), "beta=-0.1"),
        (lambda: BOND(n=4, num_anchor_samples=1), "num_anchor_samples=1"),
        (lambda: BOND(n=4, log_quantile="jbond"), "log_quantile='jbond': .*clamped, harmonic"),
        (lambda: BestOfNSFT(n=1), "n=1"),
        (lambda: Reinforce(beta_rl=-0.1), "beta_rl=-0.1"),
        (lambda: RLOO(beta_rl=math.nan), "beta_rl=nan"),
        (lambda: RLOO(beta_rl=0.1, num_samples=1), "num_samples=1: .*>= 2"),
        (lambda: GRPO(beta_rl=-0.1), "beta_rl=-0.1"),
        (lambda: GRPO(beta_rl=0.1, num_samples=1), "num_samples=1: .*>= 2"),
        (lambda: GRPO(beta_rl=0.1, scale_rewards="batch"), "scale_rewards='batch': .*group, none"),
        (lambda: VBON(n=1, num_anchor_samples=4), "n=1"),
        (lambda: VBON(n=4, num_anchor_samples=1), "num_anchor_samples=1"),
        (lambda: BoNBoN(n=1), "n=1"),
        (lambda: BoNBoN(n=4, alpha=2.0), "alpha=2.0"),
        (lambda: BestOfNRegression(n=1, num_samples=4), "n=1"),
        (lambda: BestOfNRegression(n=8, num_samples=4), "num_samples=4: .*>= 8"),
        (lambda: Listwise(n=1), "n=1"),
        (lambda: Listwise(n=8, num_samples=4), "num_samples=4: .*>= 8"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(build, message):
    with pytest.raises(ConfigError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
