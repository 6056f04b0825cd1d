"""How strong self_bond's signal must be for this model: raised while the measured N is below n, lowered above it.

The strength that is solved for n holds for a policy that can move freely. A model that pays more KL for its win rate
comes to rest below n. So the signal is multiplied by a factor that follows the error as the adaptive KL coefficient of
Ziegler et al. 2019 (arXiv 1909.08593, section 2.2) does: by at most 2% a step.
"""

import math

MAX_CHANGE = 0.02  # change of the factor in a step: a policy follows in tens of steps, and faster would swing
MEMORY = 0.9  # of the win rate, from step to step
MAX_FACTOR = 4.0  # a model that needs more does not get to n at a KL that anyone would pay


class SignalStrength:
    """A factor of the signal, and the win rate against the reference that steers it."""

    def __init__(self, n: int) -> None:
        """Start as the policy does: at the reference, with the solved strength."""
        self._n, self.factor, self._win_rate = n, 1.0, 0.5

    @property
    def measured_n(self) -> float:
        """Effective N of the policy on the last steps' prompts, about the last ten."""
        return self._win_rate / max(1.0 - self._win_rate, 1e-9)

    def update(self, win_rate: float) -> None:
        """Take in a step's win rate against the reference, in [0, 1]."""
        self._win_rate = MEMORY * self._win_rate + (1.0 - MEMORY) * win_rate
        missing = 1.0 - math.log(max(self.measured_n, 1e-9)) / math.log(self._n)  # part of the way to n, in log N
        change = MAX_CHANGE * max(-1.0, min(1.0, missing))
        self.factor = max(1.0 / MAX_FACTOR, min(MAX_FACTOR, self.factor * (1.0 + change)))

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"factor": self.factor, "win_rate": self._win_rate}

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.factor, self._win_rate = state["factor"], state["win_rate"]
