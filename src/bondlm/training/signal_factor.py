"""A factor for self_bond's signal that adapts to the model: it grows while the measured N is below n.

The strength solved for n is right for a policy that can move freely; a policy that pays more KL for its win rate
settles below n. Like the adaptive KL coefficient of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2), the factor
follows the error by at most 2% per step. It also takes the trend of N into account, and waits while the policy cannot
move.

If many samples tie, N cannot be measured without bias: from K samples and one of the reference it comes out too high,
up to double for n = 8 and 0/1 rewards (docs/theory.md, "Wins with ties"). The factor is then not changed.
"""

import math
from collections.abc import Mapping
from typing import Any

from bondlm.bestofn.quantiles import tied_share
from bondlm.training.processes import World
from bondlm.training.rollout import Rollout

MAX_CHANGE = 0.02  # of the factor, per step
MAX_FACTOR = 4.0  # a model that needs more cannot reach n at an acceptable KL
FAST, SLOW = 0.1, 0.03  # weights of a step's win rate in the two running means
# Of the pairs of a prompt's samples: up to this share the measured N of Best-of-n is at most 20% too high (n = 4: 11%),
# whatever the levels, for n <= 8 and K >= 4.
MAX_TIED = 0.1
AHEAD = 2.0  # weight of the difference between the means' log N: without it N overshoots if the policy follows slowly


class SignalFactor:
    """The factor, and the win rate against the reference that steers it."""

    def __init__(self, n: int) -> None:
        """Start like the policy, at the reference, with the solved strength."""
        self._n, self.factor, self._fast, self._slow = n, 1.0, 0.5, 0.5
        self._tied: float | None = None

    @property
    def measured_n(self) -> float | None:
        """Effective N of the policy on the prompts of about the last ten steps; None if too many samples tie."""
        return None if (self._tied or 0.0) > MAX_TIED else math.exp(_log_odds(self._fast))

    def update(self, win_rate: float, pace: float, tied: float = 0.0) -> None:
        """Update the factor with a step.

        Args:
            win_rate: of the policy against the reference, in [0, 1].
            pace: the step's learning rate over the run's largest.
            tied: share of the pairs of a prompt's own samples whose rewards are equal.
        """
        self._tied = tied if self._tied is None else self._tied + FAST * (tied - self._tied)
        self._fast += FAST * (win_rate - self._fast)
        self._slow += SLOW * (win_rate - self._slow)
        if self.measured_n is None:
            return
        log_n = _log_odds(self._fast)
        missing = 1.0 - (log_n + AHEAD * (log_n - _log_odds(self._slow))) / math.log(self._n)
        change = MAX_CHANGE * pace * max(-1.0, min(1.0, missing))
        self.factor = max(1.0 / MAX_FACTOR, min(MAX_FACTOR, self.factor * (1.0 + change)))

    def steer(self, rollout: Rollout, world: World, pace: float) -> dict[str, float]:
        """Update the factor with a step's rollout, equally on every process; returns the metrics to log."""
        assert rollout.wins_P is not None  # noqa: S101  set by `select` if the plan is `steered_to`
        tied_P = tied_share(rollout.samples.ranked[:, : rollout.plan.policy])
        wins, tied, counted = (world.gather(each) for each in (rollout.wins_P, tied_P, rollout.is_counted_P))
        if counted.any():
            self.update(float(wins[counted].mean()), pace, float(tied[counted].mean()))
        measured = self.measured_n
        return {"bond/signal_factor": self.factor} | ({} if measured is None else {"bond/effective_n": measured})

    def state(self) -> dict[str, float | None]:
        """For a checkpoint."""
        return {"factor": self.factor, "fast": self._fast, "slow": self._slow, "tied": self._tied}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.factor, self._fast, self._slow, self._tied = (state[name] for name in ("factor", "fast", "slow", "tied"))


def learning_pace(optimizer: Any) -> float:
    """The learning rate of the current step over the run's largest, in [0, 1]."""
    group = optimizer.param_groups[0]
    # Most schedulers store the largest one. A scheduler that follows a metric does not, but starts with the largest,
    # which checkpoints keep.
    largest = group.setdefault("initial_lr", group["lr"])
    return min(1.0, float(group["lr"]) / float(largest)) if largest else 1.0


def _log_odds(share: float) -> float:
    """Log odds of a win rate: log N for Best-of-N's N / (N + 1)."""
    return math.log(max(share, 1e-9)) - math.log(max(1.0 - share, 1e-9))
