import functools
import random

import pytest

from bondlm.errors import DataError
from bondlm.evaluation.rouge import common_subsequence, rouge_judge, rouge_l


def slow(first, second):
    @functools.cache
    def best(i, j):
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + best(i + 1, j + 1)
        return max(best(i + 1, j), best(i, j + 1))

    return best(0, 0)


def test_common_subsequences_equal_the_plain_recursion():
    chance = random.Random(0)
    for _ in range(200):
        first, second = (tuple(chance.choices("abc", k=chance.randrange(12))) for _ in range(2))
        assert common_subsequence(first, second) == slow(first, second)
    assert common_subsequence(range(500), range(100, 700)) == 400  # longer than a machine word


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        ("the cat sat", "The cat sat.", 1.0),
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004's example, F1
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("", "a", 0.0),
        ("...", "...", 0.0),
        ("a b c d", "b d", 2 * 2 / 6),
    ],
)
def test_rouge_l(text, reference, value):
    assert rouge_l(text, reference) == pytest.approx(value)


def test_the_judge_reads_its_column_and_refuses_rows_without_it():
    rows = [{"prompt": "p", "answer": "a b"}, {"prompt": "q", "answer": "c"}]
    judge = rouge_judge(rows, "answer")
    assert judge.weight == 0.0
    chat = [{"role": "assistant", "content": "a b"}]
    assert judge.function(["p", "q"], [chat, "x"], answer=["a b", "c"]) == [1.0, 0.0]
    number = rouge_judge([{"prompt": "p", "answer": 42}], "answer")
    assert number.function(["p"], ["42"], answer=[42]) == [1.0]
    with pytest.raises(DataError, match=r"row 1 .*reference_column 'answer'"):
        rouge_judge([rows[0], {"prompt": "q", "answer": None}], "answer")
