"""Merging of task vectors: closed forms, symmetry, and low-rank ones as the matrices that they stand for."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from bondlm.errors import ConfigError
from bondlm.models.task_vectors import LowRank, Merging, dot, plus, scaled


def merged(method: Literal["mean", "slerp"], *vectors: Tensor | LowRank) -> Tensor | LowRank:
    merging = Merging(method)
    norms = [merging.add(vector) for vector in vectors]
    assert norms == pytest.approx([dot(vector, vector) for vector in vectors])
    return merging.merged()


def matrix(seed: int, rows: int = 5, columns: int = 7) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(seed: int, rank: int) -> LowRank:
    return LowRank(matrix(seed, 5, rank), matrix(seed + 100, rank, 7))


def whole(vector: Tensor | LowRank) -> Tensor:
    return vector.up @ vector.down if isinstance(vector, LowRank) else vector


def test_two_matrices_merge_by_the_formula_of_spherical_interpolation() -> None:
    one, two = matrix(1), 3.0 * matrix(2)
    angle = math.acos(float((one * two).sum() / (one.norm() * two.norm())))
    expected = (math.sin(angle / 2) * one + math.sin(angle / 2) * two) / math.sin(angle)
    torch.testing.assert_close(whole(merged("slerp", one, two)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole(merged("mean", one, two)), (one + two) / 2)


def test_a_quarter_turn_in_the_plane() -> None:
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(whole(merged("slerp", one, two)), torch.tensor([1.0, 1.0]) / math.sqrt(2))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_unrelated_vectors_keep_their_length_and_their_mean_does_not(count: int) -> None:
    axes = list(2.0 * torch.eye(count, dtype=torch.float64))
    assert whole(merged("slerp", *axes)).norm() == pytest.approx(2.0)
    assert whole(merged("mean", *axes)).norm() == pytest.approx(2.0 / math.sqrt(count))


def test_no_order_of_three_is_another_merge() -> None:
    vectors = [matrix(seed) * (seed + 1) for seed in range(3)]
    forwards, backwards = merged("slerp", *vectors), merged("slerp", *reversed(vectors))
    torch.testing.assert_close(whole(forwards), whole(backwards))


@pytest.mark.parametrize("method", ["mean", "slerp"])
def test_parallel_vectors_and_tensors_that_a_run_has_left_alone(method: Literal["mean", "slerp"]) -> None:
    one = matrix(1)
    torch.testing.assert_close(whole(merged(method, one, 3 * one)), 2 * one)  # the limit of the arc
    still = torch.zeros_like(one)
    torch.testing.assert_close(whole(merged(method, one, still)), one / 2)
    torch.testing.assert_close(whole(merged(method, still, still)), still)


def test_opposite_vectors_have_no_arc_between_them() -> None:
    with pytest.raises(ConfigError, match="slerp"):
        merged("slerp", matrix(1), -matrix(1))
    assert whole(merged("mean", matrix(1), -matrix(1))).norm() == 0


@pytest.mark.parametrize("method", ["mean", "slerp"])
def test_low_rank_vectors_merge_as_their_products_do(method: Literal["mean", "slerp"]) -> None:
    vectors = [low_rank(seed, rank=2) for seed in range(3)]
    products = [whole(vector) for vector in vectors]
    assert dot(vectors[0], vectors[1]) == pytest.approx(float((products[0] * products[1]).sum()))
    torch.testing.assert_close(whole(plus(scaled(vectors[0], -2.0), vectors[1])), products[1] - 2 * products[0])
    torch.testing.assert_close(whole(merged(method, *vectors)), whole(merged(method, *products)))
    factors_apart = whole(LowRank(sum(v.up for v in vectors) / 3, sum(v.down for v in vectors) / 3))  # type: ignore[arg-type]
    assert (factors_apart - sum(products) / 3).norm() > 1.0  # the mistake that this is not


def test_a_lower_rank_is_the_nearest_and_says_how_far_it_is() -> None:
    vector = plus(low_rank(1, 2), low_rank(2, 2))
    assert isinstance(vector, LowRank)
    singular = torch.linalg.svdvals(whole(vector))
    exact, lost, total = vector.of_rank(4)
    torch.testing.assert_close(whole(exact), whole(vector))
    assert (lost, total) == pytest.approx((0.0, float(whole(vector).square().sum())), abs=1e-20)
    near, lost, _ = vector.of_rank(3)
    assert near.up.shape == (5, 3)
    assert lost == pytest.approx(float(singular[3] ** 2))
    assert float((whole(near) - whole(vector)).square().sum()) == pytest.approx(lost)
    padded, _, _ = vector.of_rank(6)
    assert (padded.up.shape, padded.down.shape) == ((5, 6), (6, 7))
    torch.testing.assert_close(whole(padded), whole(vector))
