"""A step's rollout: the samples drawn, scored and selected, and everything that the loss needs.

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
    signal_PC: Tensor  # fp64, like the baseline
    sampled_logp_PC: Tensor  # under the policy
    anchor_logp_PC: Tensor
    baseline_PC: Tensor
    reference_logp_PC: Tensor | None  # at logged steps, for the KL, and where gamma_ref > 0
    pull_PC: Tensor | None  # of gamma_ref
    wins_P: Tensor | None  # against the reference, if they steer the signal
    is_real_P: Tensor  # bool; the others were already learned from and fill up a last batch
    is_counted_P: Tensor  # bool, among the real ones; the others get no weight
    num_passes: int  # forward passes over the compared samples

    @property
    def groups(self) -> list[Group]:
        """Each prompt's ids with the ids of its completions to learn from."""
        pairs = zip(self.rows, self.learned, strict=True)
        return [(row[PROMPT_IDS], [c.ids for c in completions]) for row, completions in pairs]

    @property
    def compared(self) -> list[list[Completion]]:
        """The compared completions, P x C."""
        return [completions[: self.plan.compare] for completions in self.learned]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The inputs of the loss other than log-probabilities, one row per prompt, in fp32.

        Without anchor samples the level of the signal is arbitrary (RLOO's signals are the rewards themselves), and the
        loss uses only its distance from the baseline. The common part is subtracted here, because fp32 would round it.
        """
        shared_P1 = self.baseline_PC.mean(dim=1, keepdim=True) if self.plan.anchor == 0 else 0.0
        tensors = {
            "signal_PC": (self.signal_PC - shared_P1).float(),
            "baseline_PC": (self.baseline_PC - shared_P1).float(),
            "anchor_logp_PC": self.anchor_logp_PC,
            "weight_P": self.is_counted_P.float(),
        }
        return tensors if self.pull_PC is None else tensors | {"pull_PC": self.pull_PC}
