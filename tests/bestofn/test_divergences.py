import math

import numpy as np
import pytest
import torch

from bondlm.bestofn import (
    backward_kl,
    best_of_n_logprob,
    best_of_n_probs,
    forward_kl,
    kl_bound,
    kl_divergence,
    kl_k1,
    kl_k3,
    log_quantile,
    mean_signal,
)

POLICY = np.array([0.1, 0.2, 0.3, 0.4])
OTHER = np.array([0.4, 0.1, 0.3, 0.2])


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_estimators_are_unbiased_on_policy_samples(estimator):
    terms = estimator(np.log(POLICY), np.log(OTHER))
    assert POLICY @ terms == pytest.approx(float(kl_divergence(POLICY, OTHER)), abs=1e-15)
    assert OTHER @ terms != pytest.approx(float(kl_divergence(POLICY, OTHER)), abs=0.01)


def test_k3_is_never_negative_and_less_noisy_nearby():
    logp = np.log(POLICY)
    near = np.log(0.95 * POLICY + 0.05 * OTHER)
    k1, k3 = kl_k1(logp, near), kl_k3(logp, near)
    assert (k3 >= 0).all()
    assert (k1 < 0).any()
    assert POLICY @ k3**2 < 0.01 * (POLICY @ k1**2)
    np.testing.assert_array_equal(kl_k3(logp, logp), np.zeros(4))


@pytest.mark.parametrize("n", [1, 2, 5.5])
def test_best_of_n_logprob_is_the_limit_of_the_exact_distribution(n):
    num_outcomes = 20_000
    probs, rewards = np.full(num_outcomes, 1 / num_outcomes), np.arange(float(num_outcomes))
    p_le = np.arange(1, num_outcomes + 1) / num_outcomes
    approximate = best_of_n_logprob(np.log(probs), p_le, n)
    exact = np.log(best_of_n_probs(probs, rewards, n))
    np.testing.assert_allclose(approximate[num_outcomes // 10 :], exact[num_outcomes // 10 :], atol=2e-3)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_kls_between_reference_and_best_of_n_are_the_closed_forms(n):
    # Policy = reference, continuous quantiles u: forward terms on u ~ Beta(n, 1), backward terms on uniform u.
    uniform = (np.arange(200_000) + 0.5) / 200_000
    zeros = np.zeros_like(uniform)
    assert forward_kl(zeros, zeros, uniform ** (1 / n), n).mean() == pytest.approx(kl_bound(n), abs=1e-4)
    assert backward_kl(zeros, zeros, uniform, n).mean() == pytest.approx(n - 1 - math.log(n), abs=1e-3)


def test_a_policy_equal_to_best_of_n_has_no_divergence():
    ref_logp, p_le = np.array([-3.0, -7.0]), np.array([0.2, 0.9])
    target = best_of_n_logprob(ref_logp, p_le, 4)
    np.testing.assert_array_equal(forward_kl(target, ref_logp, p_le, 4), [0.0, 0.0])
    np.testing.assert_array_equal(backward_kl(target + 1, ref_logp, p_le, 4), [1.0, 1.0])
    np.testing.assert_array_equal(forward_kl(target + 1, ref_logp, p_le, 4), [-1.0, -1.0])


def test_a_quantile_of_zero():
    assert best_of_n_logprob(np.array([-1.0]), np.array([0.0]), 1)[0] == -1.0
    assert best_of_n_logprob(np.array([-1.0]), np.array([0.0]), 2)[0] == -math.inf
    assert backward_kl(np.array([-1.0]), np.array([-1.0]), np.array([0.0]), 2)[0] == math.inf


def test_kinds():
    logp, other, p_le = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), torch.tensor([0.5, 0.25])
    results = [
        (kl_k1(logp, other), kl_k1(logp.numpy(), other.numpy())),
        (kl_k3(logp, other), kl_k3(logp.numpy(), other.numpy())),
        (best_of_n_logprob(logp, p_le, 3), best_of_n_logprob(logp.numpy(), p_le.numpy(), 3)),
        (forward_kl(logp, other, p_le, 3), forward_kl(logp.numpy(), other.numpy(), p_le.numpy(), 3)),
        (backward_kl(logp, other, p_le, 3), backward_kl(logp.numpy(), other.numpy(), p_le.numpy(), 3)),
    ]
    for as_torch, as_numpy in results:
        assert as_torch.dtype == torch.float64
        assert isinstance(as_numpy, np.ndarray)
        np.testing.assert_array_equal(as_torch.numpy(), as_numpy)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"^logp and other_logp "):
        kl_k1(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"^logp and other_logp "):
        forward_kl(np.zeros(3), np.zeros(2), np.ones(2), 2)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p_le"):
            best_of_n_logprob(np.zeros(1), np.array([bad]), 2)
    with pytest.raises(ValueError, match=r"^n .*got 0"):
        best_of_n_logprob(np.zeros(1), np.ones(1), 0)


# -- bias and variance against the oracle: the lines of the table in the module's docstring

TIED_REF = np.array([0.3, 0.1, 0.2, 0.15, 0.25])
TIED_REWARDS = np.array([0.0, 1.0, 1.0, 2.0, -1.0])
TIED_POLICY = np.array([0.1, 0.2, 0.3, 0.3, 0.1])


def exact_quantiles():
    below = (TIED_REF * (TIED_REWARDS[None] < TIED_REWARDS[:, None])).sum(1)
    return (TIED_REF * (TIED_REWARDS[None] <= TIED_REWARDS[:, None])).sum(1), below


@pytest.mark.parametrize("n", [2, 4.5, 16])
def test_both_kls_are_unbiased_with_exact_quantiles_ties_or_not(n):
    p_le, p_lt = exact_quantiles()
    best, logp, ref_logp = best_of_n_probs(TIED_REF, TIED_REWARDS, n), np.log(TIED_POLICY), np.log(TIED_REF)
    np.testing.assert_allclose(best_of_n_logprob(ref_logp, p_le, n, p_lt), np.log(best), rtol=1e-12, atol=1e-13)
    forward, backward = (f(logp, ref_logp, p_le, n, p_lt) for f in (forward_kl, backward_kl))
    assert best @ forward == pytest.approx(float(kl_divergence(best, TIED_POLICY)), abs=1e-12)
    assert TIED_POLICY @ backward == pytest.approx(float(kl_divergence(TIED_POLICY, best)), abs=1e-12)
    # Without p_lt: log π_BoN is over-estimated by log n − log B, at most log n.
    excess = best_of_n_logprob(ref_logp, p_le, n) - np.log(best)
    assert (excess > 0).all()
    assert excess.max() == pytest.approx(math.log(n), abs=1e-12)  # the worst outcome: nothing is below it


@pytest.mark.parametrize("method", ["clamped", "harmonic"])
@pytest.mark.parametrize(("n", "num_ref"), [(2, 4), (8, 16)])
def test_the_bias_of_both_kls_is_that_of_the_log_quantile(n, num_ref, method):
    """Reference samples drawn anew 20,000 times; every outcome's term is averaged and weighted by its probability."""
    p_le, _ = exact_quantiles()
    rng = np.random.default_rng(0)
    refs = TIED_REWARDS[rng.choice(5, p=TIED_REF, size=(20_000, num_ref))]
    own = np.broadcast_to(TIED_REWARDS, (20_000, 5))
    estimated = np.exp(log_quantile(own, refs, method))
    logp, ref_logp = (np.broadcast_to(np.log(x), (20_000, 5)) for x in (TIED_POLICY, TIED_REF))
    # Here B is left at n on both sides: the bias of p̂ alone.
    bias = mean_signal(TIED_REF, TIED_REWARDS, n, estimate=method, k=num_ref) - (n - 1) * np.log(p_le)
    best = best_of_n_probs(TIED_REF, TIED_REWARDS, n)
    for function, probs, sign in ((forward_kl, best, 1), (backward_kl, TIED_POLICY, -1)):
        exact = probs @ function(logp[0], ref_logp[0], p_le, n)
        estimates = function(logp, ref_logp, estimated, n) @ probs
        standard_error = estimates.std() / math.sqrt(len(estimates))
        assert abs(estimates.mean() - exact - sign * (probs @ bias)) < 4 * standard_error
        assert abs(probs @ bias) > 6 * standard_error or method == "harmonic"
    spread = (backward_kl(logp, ref_logp, estimated, n)).std(0)
    np.testing.assert_allclose(spread, (n - 1) * np.log(estimated).std(0), rtol=1e-10, atol=1e-12)


def test_the_bias_of_the_log_quantile_is_as_documented():
    rewards, probs, num_ref = np.arange(4.0), np.array([0.01, 0.29, 0.3, 0.4]), 32
    p = probs.cumsum()
    harmonic = mean_signal(probs, rewards, 2, estimate="harmonic", k=num_ref) - np.log(p)
    tail = np.array([sum((1 - q) ** j / j for j in range(num_ref + 1, 20_000)) for q in p])
    np.testing.assert_allclose(harmonic, tail, atol=1e-12)
    clamped = mean_signal(probs, rewards, 2, estimate="clamped", k=num_ref) - np.log(p)
    np.testing.assert_allclose(clamped[1:], (-(1 - p) / (2 * num_ref * p))[1:], rtol=0.15, atol=1e-4)
    assert clamped[0] > 0.3  # far below the clamp, 1/64: too high


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_mean_and_spread_of_k1_and_k3_on_drawn_samples(estimator):
    logp, other = np.log(POLICY), np.log(OTHER)
    drawn = np.random.default_rng(1).choice(4, p=POLICY, size=40_000)
    terms, exact = estimator(logp[drawn], other[drawn]), float(kl_divergence(POLICY, OTHER))
    ratio = OTHER / POLICY
    value = -np.log(ratio) if estimator is kl_k1 else ratio - np.log(ratio)
    variance = POLICY @ value**2 - (POLICY @ value) ** 2
    assert abs(terms.mean() - exact) < 4 * math.sqrt(variance / len(terms))
    assert terms.var() == pytest.approx(variance, rel=0.05)


def test_k3_can_be_the_noisier_one_far_away():
    policy, other = np.array([0.001, 0.999]), np.array([0.5, 0.5])
    k1, k3 = (f(np.log(policy), np.log(other)) for f in (kl_k1, kl_k3))
    assert policy @ k3**2 - (policy @ k3) ** 2 > 50 * (policy @ k1**2 - (policy @ k1) ** 2)


def test_a_strict_quantile_above_the_other_is_refused():
    with pytest.raises(ValueError, match=r"^p_lt .*p_le"):
        best_of_n_logprob(np.zeros(1), np.array([0.4]), 2, np.array([0.5]))
    with pytest.raises(ValueError, match=r"^p_lt .*\[0, 1\]"):
        best_of_n_logprob(np.zeros(1), np.array([0.4]), 2, np.array([-0.5]))
