"""What a person reads on the terminal: the tables of an evaluation."""

import io
import math

import pytest
from rich.console import Console

from bondlm.evaluation.statistics import summarize
from bondlm.evaluation.table import print_curve, print_evaluation, print_phases, print_table, spread
from evaluation.helpers import case, scored


def piped():
    return Console(file=io.StringIO(), width=120)


def test_an_evaluation_during_training_is_a_table_without_inf():
    ends = {"": math.inf, "_low": math.inf, "_high": math.inf}
    metrics = {f"eval_effective_n{end}": value for end, value in ends.items()}
    for name in ("win_rate", "reward", "reference_reward", "kl"):
        metrics |= {f"eval_{name}": 0.75, f"eval_{name}_low": 0.5, f"eval_{name}_high": 1.0}
    console = piped()
    print_evaluation(console, 7, metrics, 16)
    text = console.file.getvalue()
    assert "step 7" in text
    assert "> 16" in text
    assert "inf" not in text
    assert "0.750 ±0.250" in text


@pytest.mark.parametrize(
    ("value", "low", "high", "digits", "shown"),
    [
        (0.824, 0.781, 0.866, 2, "0.82 ±0.04"),
        (0.5, 0.41, 0.67, 3, "0.500 ±0.130"),
        (0.5, 0.45, 0.7, 3, "0.500 [0.450, 0.700]"),
        (1.0, 0.912, 1.0, 3, "1.000 [0.912, 1.000]"),
        (0.0, 0.0, 0.842, 3, "0.000 [0.000, 0.842]"),
        (0.011, 0.010, 0.015, 2, "0.01 ±0.00"),  # to two digits its ends are those of ±
        (2.0, 2.0, 2.0, 2, "2.00 ±0.00"),
        (2.0, -math.inf, math.inf, 2, "2.00"),
        (math.nan, math.nan, math.nan, 2, ""),
    ],
)
def test_an_interval_that_lies_to_one_side_of_its_value_is_printed_with_its_ends(value, low, high, digits, shown):
    """As ±0.044, the interval of 40 prompts that were all won would end at 1.044, and begin above its own lower end."""
    assert spread({"value": value, "low": low, "high": high}, digits) == shown


def test_the_final_tables_show_order_verbosity_both_kls_and_the_cost():
    policy, reference, others = case()
    others["policy, greedy"] = scored(policy.rewards_PM[:, :1])
    console = piped()
    print_table(console, summarize(policy, reference, others, opponent=scored(policy.rewards_PM)))
    text = console.file.getvalue()
    for word in (
        "log-quantile",
        "reward-length",
        "forward",
        "backward",
        "k3 per token",
        "One answer: 10",
    ):
        assert word in text
    assert "Win rate against the opponent: 0.5" in text
    assert "nan" not in text


def test_a_number_that_no_answer_has_is_an_empty_cell() -> None:
    policy, reference, others = case(text="one")  # distinct-2 needs two words
    others["policy, greedy"] = scored(policy.rewards_PM[:, :1], text="one")
    result = summarize(policy, reference, others)
    assert math.isnan(result["distinct_2"])
    console = piped()
    print_table(console, result)
    assert "nan" not in console.file.getvalue()


def test_a_policy_below_its_reference_has_no_n() -> None:
    policy, reference, others = case()
    worse = scored(-policy.rewards_PM, log_ratio=1.2)
    others["policy, greedy"] = scored(worse.rewards_PM[:, :1])
    console = piped()
    print_table(console, summarize(worse, reference, others))
    text = console.file.getvalue()
    assert "One sample of the trained model is below the untouched one (win rate 0.1955, under 0.5)" in text
    assert "Best-of-N itself needs" not in text


@pytest.mark.parametrize("best", [True, False])
def test_what_best_of_n_needs_is_a_lower_bound_where_n_is_beyond_the_samples(best: bool) -> None:
    """1.84 nats and 160 tokens are those of Best-of-16: the N of a policy that always wins may be 20 or 2,000."""
    policy, reference, others = case(num_prompts=40)
    others["policy, greedy"] = scored(policy.rewards_PM[:, :1])
    result = summarize(scored(policy.rewards_PM + 10.0 * best, log_ratio=3.0), reference, others)
    assert math.isinf(result["effective_n"]["value"]) is best
    console = piped()
    print_table(console, result)
    print_curve(console, [{"toward_reference": 0.0} | result])
    text = " ".join(console.file.getvalue().split())
    needs = "(Best-of-N itself needs at least 1.84)"
    cost = "Best-of-N of the untouched model: at least 160 tokens, and at least 16 rewards."
    assert [needs in text, cost in text, "≥ 1.84" in text] == [best] * 3
    assert ("at least" in text) is ("≥" in text) is best


def test_the_tables_fit_80_columns() -> None:
    """Nothing is wrapped there: on a wider terminal they are the same."""
    policy, reference, others = case()
    others["policy, greedy"] = scored(policy.rewards_PM[:, :1])
    result = summarize(policy, reference, others)
    narrow, wide = (Console(file=io.StringIO(), width=width) for width in (80, 200))
    for console in (narrow, wide):
        print_table(console, result, headline=False)
        metrics = {f"eval_effective_n{end}": 4.5 for end in ("", "_low", "_high")}
        for name in ("win_rate", "reward", "reference_reward", "kl"):
            metrics |= {f"eval_{name}": 1.75, f"eval_{name}_low": 0.5, f"eval_{name}_high": 3.0}
        print_evaluation(console, 7, metrics | {"eval_completions/mean_length": 112.5}, 16)
        print_phases(console, {"generate": 2.0, "reference": 1.0}, {"num_tokens": 100.0}, 3.0)
    cells = [" ".join(console.file.getvalue().split()) for console in (narrow, wide)]
    assert cells[0] == cells[1]
    sentences = ("KL to the", "One answer")  # a terminal wraps these
    tables = [line for line in narrow.file.getvalue().splitlines() if not line.startswith(sentences)]
    assert max(map(len, tables)) <= 80
