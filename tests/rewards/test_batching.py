import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bondlm.rewards.batching import map_micro_batches, micro_batches, pad_right

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(lengths=LENGTHS, max_rows=st.integers(1, 9), max_tokens=st.integers(1, 200))
def test_every_row_once_within_both_bounds(lengths, max_rows, max_tokens):
    batches = micro_batches(lengths, max_rows=max_rows, max_tokens=max_tokens)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) <= max_rows
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= max_tokens


@given(lengths=LENGTHS, max_rows=st.integers(1, 9))
def test_longest_batch_comes_first_and_lengths_never_rise(lengths, max_rows):
    batches = micro_batches(lengths, max_rows=max_rows, max_tokens=10**6)
    flat = [lengths[row] for rows in batches for row in rows]
    assert flat == sorted(lengths, reverse=True)
    assert len(batches) == -(-len(lengths) // max_rows)


def test_sorting_pads_less_than_the_given_order():
    lengths = [50, 1] * 8
    batches = micro_batches(lengths, max_rows=8, max_tokens=10**6)
    assert sum(len(rows) * max(lengths[row] for row in rows) for rows in batches) == sum(lengths)


@given(lengths=LENGTHS, max_rows=st.integers(1, 9), max_tokens=st.integers(1, 200))
def test_results_come_back_in_the_order_of_the_rows(lengths, max_rows, max_tokens):
    result = map_micro_batches(
        lengths,
        lambda rows: torch.tensor([[row, lengths[row]] for row in rows]),
        max_rows=max_rows,
        max_tokens=max_tokens,
    )
    assert result.tolist() == [[row, length] for row, length in enumerate(lengths)]


@pytest.mark.parametrize("pad_id", [0, 7])
def test_mask_comes_from_lengths_even_when_a_token_equals_the_pad(pad_id):
    encoded = {"input_ids": [[5, 7], [7, 7, 7, 0], [1]], "token_type_ids": [[0, 1], [0, 0, 1, 1], [1]]}
    padded = pad_right(encoded, [1, 0], pad_id, "cpu")
    assert padded["input_ids"].tolist() == [[7, 7, 7, 0], [5, 7, pad_id, pad_id]]
    assert padded["token_type_ids"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@given(rows=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2)), min_size=1), max_rows=st.integers(1, 9))
def test_rows_of_one_kind_share_a_batch(rows, max_rows):
    lengths, kinds = zip(*rows, strict=True)
    batches = micro_batches(lengths, max_rows=max_rows, max_tokens=10**6, kinds=kinds)
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    assert all(len({kinds[row] for row in batch}) == 1 for batch in batches)
    assert max(lengths) in [lengths[row] for row in batches[0]]
