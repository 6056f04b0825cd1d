"""What self_bond's signal is multiplied by for this model: it grows while the measured N is below n.

The strength that is solved for n holds for a policy that can move freely; one that pays more KL for its win rate comes
to rest below n. Like the adaptive KL coefficient of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2) the factor
follows the error by at most 2% a step. It also looks at where N is going, and waits while the policy cannot move.
"""

import math
from typing import Any

MAX_CHANGE = 0.02  # of the factor, in a step
MAX_FACTOR = 4.0  # a model that needs more does not get to n at a KL that anyone would pay
FAST, SLOW = 0.1, 0.03  # weights of a step's win rate in the two running means
AHEAD = 2.0  # of the difference between the means' log N: without it N overshoots a policy that follows slowly


class SignalFactor:
    """The factor, and the win rate against the reference that steers it."""

    def __init__(self, n: int) -> None:
        """Start as the policy does: at the reference, with the solved strength."""
        self._n, self.factor, self._fast, self._slow = n, 1.0, 0.5, 0.5

    @property
    def measured_n(self) -> float:
        """Effective N of the policy on the prompts of about the last ten steps."""
        return math.exp(_log_odds(self._fast))

    def update(self, win_rate: float, pace: float) -> None:
        """Take in a step's win rate, in [0, 1]; `pace` is its learning rate over the run's largest."""
        self._fast += FAST * (win_rate - self._fast)
        self._slow += SLOW * (win_rate - self._slow)
        log_n = _log_odds(self._fast)
        missing = 1.0 - (log_n + AHEAD * (log_n - _log_odds(self._slow))) / math.log(self._n)
        change = MAX_CHANGE * pace * max(-1.0, min(1.0, missing))
        self.factor = max(1.0 / MAX_FACTOR, min(MAX_FACTOR, self.factor * (1.0 + change)))

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"factor": self.factor, "fast": self._fast, "slow": self._slow}

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.factor, self._fast, self._slow = state["factor"], state["fast"], state["slow"]


def learning_pace(optimizer: Any) -> float:
    """The learning rate of the step at hand over the run's largest, in [0, 1]."""
    group = optimizer.param_groups[0]
    largest = group.get("initial_lr", group["lr"])  # schedulers note it; an optimizer of the user may have its own
    return min(1.0, float(group["lr"]) / float(largest)) if largest else 1.0


def _log_odds(share: float) -> float:
    """Log N of Best-of-N's win rate N / (N + 1)."""
    return math.log(max(share, 1e-9)) - math.log(max(1.0 - share, 1e-9))
