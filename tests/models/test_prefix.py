"""What all prompts begin with is computed once."""

from typing import Any

import pytest
import torch
from tiny import tiny_causal, tiny_gpt2, tiny_tokenizer

from bondlm.models.logprobs import row_logprobs
from bondlm.models.prefix import shared_prefix


@pytest.mark.parametrize("build", [tiny_causal, tiny_gpt2])
def test_a_shared_prefix_changes_no_logprob(build: Any) -> None:
    model = build(tiny_tokenizer())
    prefix = list(range(40, 60))
    rows = [([*prefix, *range(60, 60 + k)], list(range(100, 100 + 2 * k))) for k in (1, 3, 5, 2)]
    together = row_logprobs(model, rows, 0, start_id=None, device=torch.device("cpu"), batch_rows=3)
    alone = [row_logprobs(model, [row], 0, start_id=None, device=torch.device("cpu")) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_the_shared_prefix_leaves_a_token_of_every_prompt() -> None:
    config = tiny_causal(tiny_tokenizer()).config
    base = list(range(12))
    assert shared_prefix(config, [base, [*base, 7]]) == base[:11]
    assert shared_prefix(config, [[*base, 5], [*base, 7], [*base, 6, 6]]) == base
    assert shared_prefix(config, [[*base[:6], 1], [*base[:6], 2]]) == []  # too short to be worth it
    assert shared_prefix(config, [base]) == []
