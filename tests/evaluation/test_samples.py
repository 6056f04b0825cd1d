import math

import pytest

from bondlm.errors import DataError
from bondlm.evaluation.samples import distinct, from_rows, text_metrics


def test_distinct_n_by_hand():
    texts = [["The cat, the dog", "ignored"], ["THE CAT sat"]]
    assert distinct(texts, 1) == pytest.approx(4 / 7)  # the cat dog sat, of 7 words
    assert distinct(texts, 2) == pytest.approx(4 / 5)  # "the cat" twice
    assert math.isnan(distinct([["one"]], 2))


def test_rows_of_a_file_come_back_prompt_by_prompt():
    rows = [
        {
            "prompt": i,
            "completion": f"{i}{j}",
            "reward": 10 * i + j,
            "judges": {"a": -j},
            "finished": j == 0,
            "tokens": j + 1,
            "logprob": -1.0,
            "log_ratio": 0.5 * j,
        }
        for i in range(3)
        for j in range(2)
    ]
    result = from_rows(rows, 2)
    assert result.prompts == [0, 1, 2]
    assert result.texts[1] == ["10", "11"]
    assert result.rewards_PM.tolist() == [[0, 1], [10, 11], [20, 21]]
    assert result.judges["a"].tolist() == [[0, -1]] * 3
    assert result.log_ratio_PM.tolist() == [[0, 0.5]] * 3
    with pytest.raises(DataError, match="reward"):
        from_rows([rows[0] | {"reward": None}, *rows[1:]], 2)
    with pytest.raises(DataError, match="rows"):
        from_rows([], 2)
    metrics = text_metrics(result)
    assert metrics["completions/mean_length"] == 1.5
    assert metrics["completions/clipped_ratio"] == 0.5
    assert metrics["entropy"] == pytest.approx(1 / 1.5)
