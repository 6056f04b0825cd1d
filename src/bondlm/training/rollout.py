"""A step's rollout: what was drawn, scored and selected, and all that its loss needs.

Shapes: P prompts of this process, M samples of each, L of them learned from, the first C of these compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bondlm.data.columns import PROMPT_IDS
from bondlm.engines import Completion
from bondlm.models.logprobs import Group
from bondlm.objectives import SamplePlan
from bondlm.rollout.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One row per prompt of this process; log-probabilities are sums over a completion's tokens, in nats."""

    rows: Sequence[Mapping[str, Any]]
    plan: SamplePlan
    samples: Samples
    learned: list[list[Completion]]  # P x L
    signal_PC: Tensor  # fp64, as is the baseline
    sampled_logp_PC: Tensor  # under the policy
    anchor_logp_PC: Tensor
    baseline_PC: Tensor
    reference_logp_PC: Tensor | None  # at logged steps, for the KL, and where gamma_ref > 0
    pull_PC: Tensor | None  # gamma_ref's
    wins_P: Tensor | None  # against the reference, where they steer the signal
    is_real_P: Tensor  # bool; the others have been learned from already, and fill up a last batch
    is_counted_P: Tensor  # bool, of the real ones; the others get no weight
    num_passes: int  # forward passes over what is compared

    @property
    def groups(self) -> list[Group]:
        """Each prompt's ids with those of its completions to learn from."""
        pairs = zip(self.rows, self.learned, strict=True)
        return [(row[PROMPT_IDS], [c.ids for c in completions]) for row, completions in pairs]

    @property
    def compared(self) -> list[list[Completion]]:
        """P x C."""
        return [completions[: self.plan.compare] for completions in self.learned]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What enters the loss beside log-probabilities, one row per prompt, in fp32.

        Without anchor samples the signal has no level of its own (RLOO's are the rewards themselves), and the loss
        looks at its distance from the baseline: what both share is taken off here, since fp32 would round it.
        """
        shared_P1 = self.baseline_PC.mean(dim=1, keepdim=True) if self.plan.anchor == 0 else 0.0
        tensors = {
            "signal_PC": (self.signal_PC - shared_P1).float(),
            "baseline_PC": (self.baseline_PC - shared_P1).float(),
            "anchor_logp_PC": self.anchor_logp_PC,
            "weight_P": self.is_counted_P.float(),
        }
        return tensors if self.pull_PC is None else tensors | {"pull_PC": self.pull_PC}
