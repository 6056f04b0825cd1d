"""The gap between the sampler's log-probabilities and the learner's."""

import pytest
import torch

from bondlm.engines import Completion
from bondlm.engines.agreement import logprob_gap, padded_logprobs
from bondlm.errors import EngineError


def test_the_gap_is_a_mean_over_real_tokens() -> None:
    rows = [[Completion([1, 2], [-1.0, -2.0], True)], [Completion([3], [-3.0], True)]]
    sampled = padded_logprobs(rows, 3)
    learned = torch.tensor([[[-1.1, -1.9, 50.0]], [[-3.0, 50.0, 50.0]]])
    assert logprob_gap(learned, sampled, 1, strict=True) == pytest.approx(0.2 / 3, abs=1e-6)  # signs do not cancel


@pytest.mark.parametrize(("shift", "outcome"), [(0.09, None), (0.11, "warn"), (0.49, "warn"), (0.51, "raise")])
def test_a_gap_warns_and_raises_at_its_limits(shift: float, outcome: str | None) -> None:
    sampled = padded_logprobs([[Completion([1, 2], [-1.0, -2.0], True)]], 2)
    learned = sampled + shift
    if outcome is None:
        logprob_gap(learned, sampled, 1, strict=True)
    elif outcome == "warn":
        with pytest.warns(UserWarning, match=r"sampler.*nats"):
            logprob_gap(learned, sampled, 1, strict=True)
    else:
        with pytest.raises(EngineError, match=r"step 7.*0\.51 nats"):
            logprob_gap(learned, sampled, 7, strict=True)
    assert logprob_gap(learned, sampled, 1, strict=False) == pytest.approx(shift, abs=1e-5)
