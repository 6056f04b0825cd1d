"""What of weights and tolerances each aggregation accepts; its mathematics is in tests/bestofn/test_aggregation.py."""

from typing import Any

import pytest
import torch

from bondlm.errors import ConfigError
from bondlm.rewards import SUM, Aggregation, NamedReward, aggregation_of


@pytest.mark.parametrize(
    ("how", "tolerances", "weights", "named"),
    [
        ("median", None, [1, 1], "reward_aggregation='median'"),
        ("quantile", [0.1, 0.1], [1, 1], "reward_tolerances.*quantile"),
        ("sum", [0.1, 0.1], [1, 1], "reward_tolerances.*sum"),
        ("lexicographic", [0.1], [1, 1], "reward_tolerances.*1 entries for 2 rewards"),
        ("lexicographic", [0.1, 0.1, 0.0], [1, 1], "reward_tolerances.*3 entries for 2 rewards"),
        ("lexicographic", [0.1, -0.1], [1, 1], "reward_tolerances"),
        ("lexicographic", [0.1, float("nan")], [1, 1], "reward_tolerances"),
        ("lexicographic", ["0.1", 0], [1, 1], "reward_tolerances"),
        ("lexicographic", None, [2, 1], "reward_weights"),
        ("worst", None, [1, 0.5], r"reward_weights.*0\.5"),
        ("worst", None, [0, 0], "reward_weights"),
        ("sum", None, [0, 0.0], "reward_weights"),
        ("quantile", None, [0, 0], "reward_weights"),
        ("quantile", None, [1, 1, 1], "reward_weights.*3 entries for 2 rewards"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(how: str, tolerances: Any, weights: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Aggregation(how, tolerances).check(weights, 2)


def test_what_fits_is_accepted_and_the_sum_is_the_default() -> None:
    for how, tolerances, weights in [
        ("sum", None, [0.5, -2]),
        ("quantile", None, [0.5, -2]),
        ("worst", None, [1, 0]),
        ("lexicographic", [0.1, 0], [-1, 1]),
    ]:
        found = aggregation_of({"reward_aggregation": how, "reward_tolerances": tolerances}, weights, 2)
        assert found == Aggregation(how, tolerances)
        assert found.by_order == (how != "sum")
    assert aggregation_of({}, None, 3) == SUM


def test_each_combines_as_it_is_called() -> None:
    rewards = [NamedReward("a", len), NamedReward("b", len, -1.0)]
    by_name = {"a": torch.tensor([[3.0, 2.0, 1.0]]).double(), "b": torch.tensor([[9.0, 0.0, 4.0]]).double()}
    combined = {how: Aggregation(how).combine(rewards, by_name)[0].tolist() for how in ("sum", "quantile", "worst")}
    assert combined["sum"] == [-6.0, 2.0, -3.0]
    assert combined["quantile"] == pytest.approx([(5 + 1) / 12, (3 + 5) / 12, (1 + 3) / 12])
    assert combined["worst"] == pytest.approx([1 / 6, 3 / 6, 1 / 6])
    assert Aggregation("lexicographic").combine(rewards, by_name)[0].tolist() == pytest.approx([5 / 6, 3 / 6, 1 / 6])
    tolerant = Aggregation("lexicographic", [1.0, 0.0]).combine(rewards, by_name)[0].tolist()
    assert tolerant == pytest.approx([3 / 6, 5 / 6, 1 / 6])
    among = {"a": torch.tensor([[0.0, 2.5]]).double(), "b": torch.tensor([[1.0, 5.0]]).double()}
    assert Aggregation("quantile").combine(rewards, by_name, among)[0].tolist() == [0.5, 0.75, 0.5]
    by_name["b"] = torch.full((1, 3), torch.nan).double()
    assert SUM.combine(rewards, by_name)[0].tolist() == [3.0, 2.0, 1.0]
