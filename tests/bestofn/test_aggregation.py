"""Combined orders against slow versions that count pairs, exact ties, and what an increasing map may change: no bit."""

import itertools
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from bondlm.bestofn import win_rates
from bondlm.bestofn.aggregation import lexicographic_ranks, mean_ranks, mid_ranks, weighted_sum, worst_ranks

NAN = float("nan")


def rewards(seed: int = 0, num_rewards: int = 3, prompts: int = 5, samples: int = 6) -> Tensor:
    """Few levels, so that many tie."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (num_rewards, prompts, samples)).astype(float))


def slow_rank(value: float, among: list[float]) -> Fraction:
    return Fraction(sum(2 * (other < value) + (other == value) for other in among), 2 * len(among))


def test_mid_ranks_count_pairs_and_their_mean_is_a_half() -> None:
    values, others = rewards()[0], rewards(1, samples=4)[0]
    for among in (values, others):
        pairs = zip(values.tolist(), among.tolist(), strict=True)
        expected = [[float(slow_rank(v, a)) for v in row] for row, a in pairs]
        assert mid_ranks(values, among).tolist() == expected
    assert torch.allclose(mid_ranks(values, values).mean(dim=1), torch.full((5,), 0.5, dtype=torch.float64))
    assert mid_ranks(torch.tensor([[3.0]]), torch.tensor([[3.0]])).tolist() == [[0.5]]


def test_the_mean_of_ranks_is_the_weighted_mean() -> None:
    values, among, weights = rewards(), rewards(7, samples=4), [1.0, 0.25, -0.5]
    for others in (values, among):
        found = mean_ranks(values, others, weights)
        for p, m in itertools.product(range(5), range(6)):
            ranks = [slow_rank(float(values[j, p, m]), others[j, p].tolist()) for j in range(3)]
            expected = (ranks[0] + ranks[1] / 4 + (1 - ranks[2]) / 2) / Fraction(7, 4)
            assert found[p, m] == float(expected)


def test_equal_means_tie_to_the_last_bit() -> None:
    """0.1 + 0.2 is not 0.3 in floating point; nor is a sum of three the same in another order."""
    values = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    tied = mean_ranks(values, values, [0.1, 0.2, 0.3])
    assert tied[0, 0] == tied[0, 1] == 0.5
    rows = torch.tensor([[[3.0, 1, 2]], [[1.0, 2, 3]], [[2.0, 3, 1]]])  # a cycle: each is first, second and third
    for weight in (1.0, 0.7, 1 / 3):
        assert mean_ranks(rows, rows, [weight] * 3).tolist() == [[0.5, 0.5, 0.5]]


def test_equal_weighted_sums_of_whole_rewards_tie_to_the_last_bit() -> None:
    passes = [torch.tensor(row, dtype=torch.float64) for row in ([1, 0, 0], [0, 1, 3], [0, 1, 0])]
    assert weighted_sum(passes, [0.6, 0.2, 0.4]).tolist() == [0.6, 0.6, 0.6]
    assert weighted_sum(passes, [-0.3, -0.1, -0.2]).tolist() == [-0.3, -0.3, -0.3]
    assert weighted_sum(passes[1:], [1 / 3, 0.0]).tolist() == [
        0.0,
        1 / 3,
        3 * (1 / 3),
    ]  # 16 digits


def test_a_weighted_sum_that_is_finite_does_not_overflow_on_the_way() -> None:
    largest = torch.tensor([sys.float_info.max], dtype=torch.float64)
    assert weighted_sum([-largest, 0 * largest], [1.0, 0.2]).tolist() == [-sys.float_info.max]


@pytest.mark.parametrize(
    "weights", [[1.5, 0.5, 1.0, 0.25], [1, 1, 1, 1], [0.1, 0.7, -0.3, 2.0], [1 / 3, 1e-9, 1e9, 3], [1e-20, 1, 0, 0]]
)
def test_a_weighted_sum_is_the_plain_one(weights: list[float]) -> None:
    values = list(torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    plain = sum(weight * value for weight, value in zip(weights, values, strict=True))
    torch.testing.assert_close(weighted_sum(values, weights), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("among", [None, rewards(3, samples=4)])
@pytest.mark.parametrize("change", [lambda x: 1e12 * x, lambda x: x - 5e5, torch.exp, lambda x: (x - 1) ** 3])
def test_an_increasing_map_of_one_reward_changes_no_bit(change: object, among: Tensor | None) -> None:
    values = rewards()
    for j in range(3):
        mapped, others = values.clone(), values if among is None else among.clone()
        mapped[j] = change(mapped[j])  # type: ignore[operator]
        mapped_others = mapped if among is None else others
        if among is not None:
            mapped_others[j] = change(mapped_others[j])  # type: ignore[operator]
        before = values if among is None else among
        assert torch.equal(
            mean_ranks(values, before, [1.0, 0.3, 2.0]), mean_ranks(mapped, mapped_others, [1.0, 0.3, 2.0])
        )
        others_or_none = (None, None) if among is None else (before, mapped_others)
        found, after = (worst_ranks(x, ks, [1, 1, -1]) for x, ks in zip((values, mapped), others_or_none, strict=True))
        assert torch.equal(found, after)


def test_the_worst_rank_is_the_lowest_and_zero_weights_are_left_out() -> None:
    values = rewards()
    found = worst_ranks(values, None, [1, -1, 0])
    for p, m in itertools.product(range(5), range(6)):
        ranks = [slow_rank(float(values[j, p, m]), values[j, p].tolist()) for j in range(2)]
        assert found[p, m] == float(min(ranks[0], 1 - ranks[1]))


def test_a_reward_that_does_not_apply_is_left_out_of_its_prompt_alone() -> None:
    values = rewards(prompts=2)
    values[1, 0] = NAN
    rest = values[[0, 2]]
    weights, tolerances = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
    assert torch.equal(mean_ranks(values, values, weights)[0], mean_ranks(rest, rest, weights[:2])[0])
    assert torch.equal(worst_ranks(values, None, weights)[0], worst_ranks(rest, None, weights[:2])[0])
    others = rewards(4, prompts=2)
    assert torch.equal(worst_ranks(values, others, weights)[0], worst_ranks(rest, others[[0, 2]], weights[:2])[0])
    assert torch.equal(
        lexicographic_ranks(values, None, weights, tolerances)[0],
        lexicographic_ranks(rest, None, weights[:2], tolerances[:2])[0],
    )
    whole = rewards(prompts=2)
    assert torch.equal(mean_ranks(values, values, weights)[1], mean_ranks(whole, whole, weights)[1])
    values[1, 1, 0] = NAN
    for among in (values, others):
        for combine in (mean_ranks, worst_ranks):
            with pytest.raises(ValueError, match="NaN"):
                combine(values, among, weights)
    with pytest.raises(ValueError, match="NaN"):
        lexicographic_ranks(values, None, weights, tolerances)


def test_lexicographic_without_tolerance_is_the_order_of_tuples() -> None:
    values = rewards()
    found = lexicographic_ranks(values, None, [1, 1, 1], [0, 0, 0])
    for p in range(5):
        tuples = [tuple(values[:, p, m].tolist()) for m in range(6)]
        expected = [
            Fraction(sum(2 * (other < mine) + (other == mine) for other in tuples), 2 * len(tuples)) for mine in tuples
        ]
        assert found[p].tolist() == [float(rank) for rank in expected]


def test_classes_of_a_tolerance_begin_with_the_best() -> None:
    """0.9 equals 1 and 0.8 equals 0.9, but the first class ends 0.15 below its best: 0.8 begins the second."""
    safety, style = [1.0, 0.9, 0.8, 0.7], [0.0, 5.0, 3.0, 4.0]
    values = torch.tensor([[safety], [style]])
    found = lexicographic_ranks(values, None, [1, 1], [0.15, 0.0])
    assert found.tolist() == [[5 / 8, 7 / 8, 1 / 8, 3 / 8]]
    inside = lexicographic_ranks(values, None, [1, 1], [0.15, 1.0])  # 4 and 3 tie, 5 and 0 do not
    assert inside.tolist() == [[5 / 8, 7 / 8, 2 / 8, 2 / 8]]
    turned = lexicographic_ranks(values, None, [1, -1], [0.15, 0.0])
    assert turned.tolist() == [[7 / 8, 5 / 8, 3 / 8, 1 / 8]]
    assert lexicographic_ranks(values, None, [1, 1], [1.0, 9.0]).tolist() == [[0.5] * 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_difference_of_just_the_tolerance_is_within_it_whatever_its_rounding(dtype: torch.dtype) -> None:
    for k in range(9):
        pair = torch.tensor([[[(k + 1) / 10, k / 10]]], dtype=dtype).double()
        assert lexicographic_ranks(pair, None, [1], [0.1]).tolist() == [[0.5, 0.5]], k
        assert lexicographic_ranks(pair[:, :, :1], pair[:, :, 1:], [1], [0.1]).tolist() == [[0.5]], k
        assert lexicographic_ranks(pair[:, :, 1:], pair[:, :, :1], [1], [0.1]).tolist() == [[0.5]], k
        assert lexicographic_ranks(pair, None, [1], [0.0999]).tolist() == [[0.75, 0.25]], k
    tiny = torch.tensor([[[1.0, 1.0 - 1e-15]]], dtype=torch.float64)
    assert lexicographic_ranks(tiny, None, [1], [0.0]).tolist() == [[0.75, 0.25]], "without a tolerance only equals tie"


def own_ranks(how: str, pool: Tensor) -> Tensor:
    if how == "worst":
        return worst_ranks(pool, None, [1] * len(pool))
    return lexicographic_ranks(pool, None, [1] * len(pool), [1.0] * len(pool))


def ranks_among(how: str, values: Tensor, among: Tensor) -> Tensor:
    if how == "worst":
        return worst_ranks(values, among, [1] * len(values))
    if how == "lexicographic":
        return lexicographic_ranks(values, among, [1] * len(values), [1.0] * len(values))
    return mean_ranks(values, among, [1] * len(values))


@pytest.mark.parametrize("how", ["worst", "lexicographic"])
def test_a_place_among_others_is_the_share_of_wins_when_all_are_ranked_together(how: str) -> None:
    """It is exact where the others' own order has such a place, and else the next place above or below."""
    generator = np.random.default_rng(0)
    mine, others = (torch.from_numpy(generator.integers(0, 7, (2, 60, m)).astype(float)) for m in (3, 5))
    found, own = ranks_among(how, mine, others), own_ranks(how, others)
    num_exact = 0
    for p, m in itertools.product(range(60), range(3)):
        pool = own_ranks(how, torch.cat([mine[:, p : p + 1, m : m + 1], others[:, p : p + 1]], dim=2))[0].tolist()
        share = float(slow_rank(pool[0], pool[1:]))
        levels = own[p].unique().tolist()
        between = [-1.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), 2.0]
        places = [float(slow_rank(v, own[p].tolist())) for v in sorted([*levels, *between])]
        place = float(slow_rank(float(found[p, m]), own[p].tolist()))
        if share in places:
            num_exact += 1
            assert place == share
        assert place in (max(x for x in places if x <= share), min(x for x in places if x >= share))
    assert num_exact > 120
    if how == "lexicographic":
        assert torch.allclose(win_rates(found, own), found.mean(dim=1))
        assert torch.equal(ranks_among(how, others, others), own)


@pytest.mark.parametrize("how", ["quantile", "worst", "lexicographic"])
@pytest.mark.parametrize(("num_rewards", "num_others"), [(4, 3), (2, 8), (4, 16)])
def test_an_unchanged_policy_wins_half(how: str, num_rewards: int, num_others: int) -> None:
    """`worst` gave 0.458 (2 rewards, 8 samples) and 0.447 (4, 16) where the values are not ranked with the others."""
    generator = np.random.default_rng(0)
    mine, others = (
        torch.from_numpy(4 * generator.random((num_rewards, num, m))) for num, m in ((1500, 2), (1500, num_others))
    )
    own = mean_ranks(others, others, [1] * num_rewards) if how == "quantile" else own_ranks(how, others)
    wins = win_rates(ranks_among(how, mine, others), own)
    assert abs(float(wins.mean()) - 0.5) < 2.5 * float(wins.std()) / len(wins) ** 0.5


def test_best_of_4_of_the_worst_rank() -> None:
    """Its win rate is 0.8; ranks among 16 samples are noisy, so it reads 0.787. It read 0.776, and N = 3.5."""
    generator = np.random.default_rng(0)
    others, drawn = (torch.from_numpy(generator.random(shape)) for shape in ((2, 4000, 16), (2, 4000, 4)))
    best = drawn.gather(2, drawn.amin(dim=0).argmax(dim=1)[None, :, None].expand(2, -1, -1))
    own = worst_ranks(others, None, [1, 1])
    wins = win_rates(worst_ranks(best, others, [1, 1]), own)
    assert float(wins.mean()) == pytest.approx(0.787, abs=0.008)


def test_equal_samples_take_the_same_place_in_any_batch() -> None:
    mine, others = rewards(0, samples=4), rewards(1, samples=6)
    found = worst_ranks(mine, others, [1, 1, 1])
    twice = worst_ranks(torch.cat([mine, mine], dim=2), others, [1, 1, 1])
    assert torch.equal(twice, torch.cat([found, found], dim=1))
    assert torch.equal(worst_ranks(mine[:, 2:3], others[:, 2:3], [1, 1, 1]), found[2:3])


def test_tolerances_form_classes_of_a_sample_together_with_the_others() -> None:
    mine, others = torch.tensor([[[0.95]], [[1.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 9.0]]])
    assert lexicographic_ranks(mine, others, [1, 1], [0.1, 0]).tolist() == [[1.0]]
    assert lexicographic_ranks(mine, others, [1, 1], [0.0, 0]).tolist() == [[0.5]]
    best = lexicographic_ranks(
        torch.tensor([[[1.0]], [[0.0]]]), torch.tensor([[[0.9, 0.8]], [[0.0, 0.0]]]), [1, 1], [0.25, 0]
    )
    assert best.tolist() == [[0.5]]  # all three are one class
