"""Seeds of samples and tie-breaks, which depend only on the run's seed, the occasion, the prompt's place and the role.

So a rollout can be repeated after a resume, on any number of processes, whatever else draws random numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bondlm.engines import Role

ROLE_NUMBER: dict[Role, int] = {"policy": 0, "anchor": 1, "reference": 2}
_TIES = 9  # used in place of a role's number
_IN_TRAINING, _AFTERWARDS = 1 << 40, 1 << 41  # far beyond the number of any training step


@dataclass(frozen=True, slots=True)
class Seeds:
    """The seeds of one occasion: a training step (from 1), or an evaluation."""

    seed: int
    step: int = 0

    @classmethod
    def of_evaluation(cls, seed: int, temperature: float) -> "Seeds":
        """The same at every evaluation of a run, but different for each temperature (to a thousandth)."""
        below = round(1000 * (1 - temperature))
        return cls(seed, _IN_TRAINING + (below if below >= 0 else 1000 - below))

    @classmethod
    def of_comparison(cls, seed: int, number: int) -> "Seeds":
        """The seeds of the sample set with this `number` in `bondlm eval`."""
        return cls(seed, _AFTERWARDS + number)

    def of_prompt(self, position: int, role: Role) -> int:
        """The seed of the samples of the prompt at this place in its data set."""
        entropy = [self.seed, self.step, position, ROLE_NUMBER[role]]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def tie_noise(self, positions: Sequence[int], num_samples: int) -> Tensor:
        """Uniform numbers (P, M) float64 that break ties between rewards, with a separate seed for each prompt."""
        rows = [np.random.default_rng([self.seed, self.step, p, _TIES]).random(num_samples) for p in positions]
        return torch.from_numpy(np.stack(rows))
