import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from bondlm.errors import ConfigError, DataError, RewardError
from bondlm.rewards import NamedReward, score

PROMPTS = ["first prompt", "second \x1b[31mprompt", "third" * 40]
COMPLETIONS = ["a", "bb", "ccc"]


def answering(value):
    """A reward that returns `value`, whatever it is asked."""
    return NamedReward("judge", lambda prompts, completions: value, 1.0)


def total(value):
    return score([answering(value)], PROMPTS, COMPLETIONS, {}).total


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, -3],
        (1, 2.5, -3),
        [np.float32(1), np.float64(2.5), np.int64(-3)],
        [Fraction(1), Fraction(5, 2), -3],
        [torch.tensor(1), torch.tensor(2.5, requires_grad=True), np.array(-3.0)],
        np.array([1, 2.5, -3], dtype=np.float16),
        np.array([[1], [2.5], [-3]]),
        [torch.tensor([1.0]), np.array([[2.5]]), -3],
        (value for value in (1, 2.5, -3)),
        np.array([1, 2.5, -3], dtype=object),
        torch.tensor([1, 2.5, -3], dtype=torch.bfloat16),
        torch.tensor([[1], [2.5], [-3]], requires_grad=True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_honest_form_becomes_float64_without_gradient(value):
    result = total(value)
    assert result.dtype is torch.float64
    assert result.device.type == "cpu"
    assert not result.requires_grad
    assert result.tolist() == [1.0, 2.5, -3.0]


@pytest.mark.parametrize(
    "value",
    [
        [True, False, True],
        [np.True_, torch.tensor(False), 1],
        np.array([True, False, True]),
        torch.tensor([True, False, True]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_booleans_are_0_and_1(value):
    assert total(value).tolist() == [1.0, 0.0, 1.0]


def multi_task(groups, second, weights=(1.0, 2.0), **more):
    """Two rewards on three rows: the first applies to the third row alone."""
    rewards = [
        NamedReward("code", lambda completions: [None, None, 5.0], weights[0]),
        NamedReward("text", lambda completions: second, weights[1]),
    ]
    return score(rewards, PROMPTS, COMPLETIONS, groups=groups, **more)


def test_none_for_all_samples_of_a_prompt_is_left_out_of_the_sum():
    scores = multi_task([7, 7, 8], [1.0, 2.0, None])
    assert scores.total.tolist() == [2.0, 4.0, 5.0]
    assert [math.isnan(v) for v in scores.by_name["code"].tolist()] == [True, True, False]
    assert multi_task([0, 0, 1], [1.0, 2.0, 3.0]).total.tolist() == [2.0, 4.0, 11.0]


@pytest.mark.parametrize(
    ("groups", "second", "weights", "message"),
    [
        ([0, 0, 0], [1.0, 2.0, 3.0], (1, 1), r"'code' is None for 2 of 3 completions"),
        ([0, 0, 1], [1.0, None, 3.0], (1, 1), r"'text' is None for 1 of 2 completions"),
        ([0, 0, 1], [None, None, 3.0], (1, 1), "'code' is None.*no other reward applies"),
        ([0, 0, 1], [1.0, 2.0, 3.0], (1, 0), "'code' is None.*no other reward applies"),  # of weight 0: only watched
    ],
)
def test_none_for_some_samples_or_from_all_rewards_is_refused(groups, second, weights, message):
    with pytest.raises(RewardError, match=message):
        multi_task(groups, second, weights)
    bad = multi_task(groups, second, weights, allow_bad_rows=True).bad
    assert set(bad) == {row for row in range(3) if groups[row] == 0}
    assert re.search(message, bad[0])


def test_functions_get_the_state_of_training_and_log_from_inside():
    def watched(completions, log_extra, log_metric, trainer_state=None, **columns):
        log_extra("words", [np.int64(len(text)) for text in completions])
        log_metric("mean_length", torch.tensor(2.0))
        log_metric("mean_length", 4)
        return [float(trainer_state)] * len(completions)

    async def asynchronous(completions, **columns):
        columns["log_extra"]("shout", [text.upper() for text in completions])
        return [0.0] * len(completions)

    rewards = [NamedReward("watched", watched), NamedReward("other", asynchronous)]
    scores = score(rewards, PROMPTS, COMPLETIONS, {"answer": [1, 2, 3]}, trainer_state=5)
    assert scores.total.tolist() == [5.0] * 3
    assert scores.columns == {"words": [1, 2, 3], "shout": ["A", "BB", "CCC"]}
    assert scores.metrics == {"mean_length": 3.0}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            lambda log_extra, log_metric: log_extra("words", [1, 2]),
            r"log_extra\('words'\).*\b2 values.*\b3 completions",
        ),
        (
            lambda log_extra, log_metric: [log_extra("words", values) for values in ([1, 2, 3], [1, 2, 3], [1, 2, 4])],
            r"log_extra\('words'\): another reward has logged other values",
        ),
        (lambda log_extra, log_metric: log_metric("mean", "high"), r"log_metric\('mean', 'high'\)"),
    ],
)
def test_what_cannot_be_logged_is_refused(log, message):
    def reward(completions, log_extra, log_metric):
        log(log_extra, log_metric)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=message):
        score([NamedReward("judge", reward)], PROMPTS, COMPLETIONS)


def test_one_row_accepts_shape_1_by_1():
    assert score([answering(torch.tensor([[4.0]]))], ["p"], ["c"], {}).total.tolist() == [4.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.0, float("nan"), 0.0], "nan.*row 1 of 3"),
        ([0.0, float("inf"), 0.0], " inf .*row 1 of 3"),
        ([0.0, -float("inf"), float("nan")], r" -inf .*row 1 of 3.*\b2 rows"),
        (torch.tensor([0.0, float("nan"), 0.0]), "nan.*row 1 of 3"),
        (np.array([0.0, np.inf, 0.0]), " inf .*row 1 of 3"),
        ([0.0, 10**400, 0.0], " inf .*row 1 of 3"),
        ([0.0, None, 0.0], "None for row 1 of 3"),
        ([0.0, "1.0", 0.0], r"'1\.0' \(str\).*row 1 of 3"),
        ([0.0, 1j, 0.0], r"1j \(complex\).*row 1 of 3"),
        ([[0.0], [1.0], [2.0]], r"\[0\.0\] \(list\).*row 0 of 3"),
        ([torch.zeros(2)] * 3, r"tensor\(\[0\., 0\.\]\) \(Tensor\).*row 0 of 3"),
        (np.array([1.0, None, 2.0], dtype=object), "None for row 1 of 3"),
        ([0.0, 1.0], r"\b2 values.*\b3 completions"),
        ([0.0] * 4, r"\b4 values.*\b3 completions"),
        ([], r"\b0 values.*\b3 completions"),
        (torch.zeros(6), r"\b6 values.*\b3 completions"),
        (torch.zeros(3, 2), r"shape \(3, 2\).*\b3 completions"),
        (np.zeros((1, 3)), r"shape \(1, 3\).*\b3 completions"),
        (torch.tensor(1.0), r"shape \(\).*\b3 completions"),
        (np.float64(1.0), "float64.*return a list"),
        (torch.zeros(3, dtype=torch.complex64), r"torch\.complex64"),
        (np.array(["1", "2", "3"]), "array.*<U1"),
        (1.0, r"float \(1\.0\)"),
        (None, r"NoneType \(None\)"),
        ("123", r"str \('123'\)"),
        ({"a": 1.0, "b": 2.0, "c": 3.0}, r"dict \(\{'a'"),
    ],
)
def test_refusals_name_the_reward_and_what_was_seen(value, message):
    with pytest.raises(RewardError, match=message) as caught:
        total(value)
    assert "reward 'judge'" in str(caught.value)
    assert re.search(r"\b[Rr]eturn\b", str(caught.value))  # what to do, and not only what it returned
    assert caught.value.exit_code == 4


def test_error_quotes_the_prompt_escaped_and_cut():
    with pytest.raises(RewardError) as caught:
        total([0.0, None, 0.0])
    assert r"(prompt 'second \x1b[31mprompt')" in str(caught.value)
    with pytest.raises(RewardError) as caught:
        total([0.0, 0.0, None])
    assert f"(prompt '{'third' * 16}')" in str(caught.value)  # 80 characters of 200


def test_error_quotes_the_last_message_of_a_chat():
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    with pytest.raises(RewardError, match="prompt 'hello'"):
        score([answering([None])], [chat], [[{"role": "assistant", "content": "hi"}]], {})


@pytest.mark.parametrize("value", [[1.0, float("nan"), 2.0], torch.tensor([1.0, float("nan"), 2.0])])
def test_nan_is_what_argmax_calls_best_and_never_gets_there(value):
    assert torch.as_tensor(value).argmax() == 1
    with pytest.raises(RewardError, match=r"'judge'.* nan "):
        total(value).argmax()


def test_weighted_sum_is_exact_and_by_name_is_unweighted():
    rewards = [
        NamedReward("length", lambda completions, **_: [len(text) for text in completions], 0.1),
        NamedReward("constant", lambda prompts, completions: [3.0] * len(prompts), -2.0),
        NamedReward("silent", lambda prompts, completions: [7.0] * len(prompts), 0.0),
    ]
    scores = score(rewards, PROMPTS, COMPLETIONS, {})
    assert scores.total.tolist() == [0.1 * 1 - 6.0, 0.1 * 2 - 6.0, 0.1 * 3 - 6.0]
    assert {name: values.tolist() for name, values in scores.by_name.items()} == {
        "length": [1.0, 2.0, 3.0],
        "constant": [3.0, 3.0, 3.0],
        "silent": [7.0, 7.0, 7.0],
    }


def test_weight_does_not_round_through_float32():
    assert score([NamedReward("r", lambda completions: [1.0 + 2**-40], 3.0)], ["p"], ["c"], {}).total.item() == 3 * (
        1.0 + 2**-40
    )


def test_a_sum_that_overflows_is_refused():
    with pytest.raises(RewardError, match=r"weighted sum.*inf.*row 0"):
        score([NamedReward("r", lambda completions: [1e308], 100.0)], ["p"], ["c"], {})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, "1", None])
def test_weight_must_be_a_finite_number(weight):
    with pytest.raises(ConfigError, match=f"'r'.*weight {weight!r}"):
        NamedReward("r", len, weight)


def test_no_rows_call_nobody():
    scores = score([NamedReward("r", lambda completions: 1 / 0)], [], [], {"answer": []})
    assert scores.total.shape == (0,)
    assert scores.by_name["r"].shape == (0,)


@pytest.mark.parametrize("names", [[], ["same", "same"]])
def test_rewards_need_names_of_their_own(names):
    with pytest.raises(ConfigError, match=re.escape(str(names))):
        score([NamedReward(name, len) for name in names], ["p"], ["c"], {})


@pytest.mark.parametrize(
    ("completions", "columns", "message"),
    [
        (["a"], {}, r"'completions'.*\b1 rows.*\b3 prompts"),
        (COMPLETIONS, {"answer": [1, 2]}, r"'answer'.*\b2 rows.*\b3 prompts"),
        (COMPLETIONS, {"prompts": PROMPTS}, "column 'prompts'"),
        (COMPLETIONS, {"log_metric": PROMPTS}, "column 'log_metric'"),
    ],
)
def test_ragged_or_clashing_input_is_a_data_error(completions, columns, message):
    with pytest.raises(DataError, match=message):
        score([answering([1.0, 2.0, 3.0])], PROMPTS, completions, columns)
