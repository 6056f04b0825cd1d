"""Task vectors, theta - theta_0, merged tensor by tensor (WARP: Ramé et al. 2024, arXiv 2406.16768).

LoRA's task vector is the product B A. The factors are never averaged separately, since a product of means is not the
mean of products.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bondlm.errors import ConfigError

Method = Literal["mean", "slerp"]
_OPPOSED = 1e-3  # length of the mean of unit vectors: below it they cancel, and no direction is left


class LowRank(NamedTuple):
    """The matrix `up @ down`, never multiplied out: up (rows, rank), down (rank, columns), fp64."""

    up: Tensor
    down: Tensor

    def of_rank(self, rank: int) -> tuple["LowRank", float, float]:
        """The nearest matrix of this rank, and the squared Frobenius norms of the remainder and of the whole.

        Both factors get the square roots of the singular values; unused ranks are zeros.
        """
        left, left_r = torch.linalg.qr(self.up)
        right, right_r = torch.linalg.qr(self.down.T)
        u, s, vh = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        up, down = left @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ right.T
        up = torch.cat([up, up.new_zeros(len(up), rank - kept)], dim=1)
        down = torch.cat([down, down.new_zeros(rank - kept, down.shape[1])])
        return LowRank(up, down), float(s[kept:].square().sum()), float(s.square().sum())


Vector = Tensor | LowRank


def dot(v: Vector, d: Vector) -> float:
    """Inner product of two task vectors of one tensor; for low-rank ones from products of the size of their ranks."""
    if isinstance(v, LowRank) and isinstance(d, LowRank):
        return float(((v.up.T @ d.up) * (v.down @ d.down.T)).sum())
    assert not isinstance(v, LowRank)  # noqa: S101  both belong to one tensor, so they are of one kind
    assert not isinstance(d, LowRank)  # noqa: S101
    return float((v.double() * d.double()).sum())


def scaled(v: Vector, a: float) -> Vector:
    """A times v."""
    return LowRank(a * v.up, v.down) if isinstance(v, LowRank) else a * v


def plus(v: Vector, d: Vector) -> Vector:
    """The sum v + d; the ranks of low-rank vectors add up."""
    if isinstance(v, LowRank) and isinstance(d, LowRank):
        return LowRank(torch.cat([v.up, d.up], dim=1), torch.cat([v.down, d.down]))
    assert not isinstance(v, LowRank)  # noqa: S101
    assert not isinstance(d, LowRank)  # noqa: S101
    return v + d


class Merging:
    """Sums the task vectors of one tensor one by one, and merges them at the end.

    "mean": (d_1 + .. + d_K) / K. "slerp": the same direction, divided by the length of the mean of d_i / |d_i|. For two
    vectors at angle w that length is cos(w / 2), which gives WARP's spherical interpolation at its midpoint,
    (d_1 sin(w / 2) + d_2 sin(w / 2)) / sin(w). Unlike a chain of such steps, it does not depend on the order of more
    than two vectors. With it, unrelated vectors keep their length, while their mean is shorter by a factor of sqrt(K).
    """

    def __init__(self, method: Method) -> None:
        """Start without vectors."""
        self._method = method
        self._sum: Vector | None = None
        self._units: Vector | None = None  # slerp: the sum of d_i / |d_i|
        self._num = self._num_moved = 0

    def add(self, vector: Vector) -> float:
        """Add a vector; returns its squared norm."""
        norm_sq = dot(vector, vector)
        self._num += 1
        self._sum = vector if self._sum is None else plus(self._sum, vector)
        if self._method == "slerp" and norm_sq > 0:  # a tensor that a run did not change has no direction
            unit = scaled(vector, 1 / math.sqrt(norm_sq))
            self._num_moved += 1
            self._units = unit if self._units is None else plus(self._units, unit)
        return norm_sq

    def merged(self, name: str = "") -> Vector:
        """The merged vector; `name` is the tensor's, for messages. A single number has no direction: it gets the mean.

        Raises:
            ConfigError: "slerp" of vectors that cancel.
        """
        assert self._sum is not None  # noqa: S101  merged after all were added
        length = 1.0
        if self._units is not None and not (isinstance(self._sum, Tensor) and self._sum.numel() == 1):
            length = math.sqrt(max(0.0, dot(self._units, self._units))) / self._num_moved
        if length < _OPPOSED:
            raise ConfigError(f"method='slerp': the runs moved {name} in opposite directions, use method='mean'")
        self._units = None  # free it: it is as large as the sum
        return scaled(self._sum, 1 / (self._num * length))
