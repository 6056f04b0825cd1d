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
def test_best_of_n_logprob_is_the_limit_of_the_exact_law(n):
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
    with pytest.raises(ValueError, match="same shape"):
        kl_k1(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="same shape"):
        forward_kl(np.zeros(3), np.zeros(2), np.ones(2), 2)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p_le"):
            best_of_n_logprob(np.zeros(1), np.array([bad]), 2)
    with pytest.raises(ValueError, match="n must be"):
        best_of_n_logprob(np.zeros(1), np.ones(1), 0)
