"""What TRL passes to reward functions in addition to data: the training state, and two functions for logging."""

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

from bondlm.errors import RewardError

NAMES = ("trainer_state", "log_extra", "log_metric")
# What a run and its evaluations log (docs/metrics.md): a second value under such a name would be averaged with it, or
# take its place.
_OF_RUNS = re.compile(
    r"(anchor|bond|completions|noise|num_tokens|sampling|time)/.*|(eval|train)_.*"
    r"|rewards/.*/(mean|std|win_rate|effective_n)|(reward|reference_reward|win_rate|effective_n|kl)(_low|_high)?"
    r"|entropy|epoch|grad_norm|learning_rate|loss|num_tokens|reward_std|runtime|skipped_steps|step|step_time"
)


class WatchedState:
    """The training state for reward functions, which notes whether one of them has used it.

    Functions with `**kwargs` get it whether they use it or not. A function that never uses it gives an answer the same
    score at every step, so only functions that use it need to be called again. It is a proxy for the state that
    `current` returns.
    """

    __slots__ = ("_current", "was_read")

    def __init__(self, current: Callable[[], Any]) -> None:
        self._current, self.was_read = current, False

    def __getattr__(self, name: str) -> Any:
        """The attribute of the state itself."""
        self.was_read = True
        return getattr(self._current(), name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the state, for `isinstance`."""
        return type(self._current())

    def __reduce__(self) -> Any:
        """Copying or pickling gives the state itself."""
        self.was_read = True
        return copy.copy, (self._current(),)


class Extras:
    """Collects what reward functions log while they score B completions; a function gets the loggers it accepts."""

    def __init__(self, count: int, trainer_state: Any = None) -> None:
        """`count` is B; `trainer_state` is None outside training."""
        self._count = count
        self.offered = {"trainer_state": trainer_state, "log_extra": self._extra, "log_metric": self._metric}
        self.columns: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[float]] = {}

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of what was logged under each name."""
        return {name: sum(values) / len(values) for name, values in self._metrics.items()}

    def _extra(self, column: str, values: Iterable[Any]) -> None:
        """Keep one value per completion, to be written next to it in samples.jsonl and the loggers' tables."""
        plain = [value.item() if hasattr(value, "item") else value for value in values]
        if len(plain) != self._count:
            raise RewardError(
                f"log_extra({column!r}) has {len(plain)} values for {self._count} completions: give one for each, in "
                "their order"
            )
        shown = [v if isinstance(v, str | int | float | None) else str(v) for v in plain]
        if self.columns.setdefault(str(column), shown) != shown:
            raise RewardError(f"log_extra({column!r}): another reward has logged other values under it, choose a name")

    def _metric(self, name: str, value: Any) -> None:
        """Keep a number; its mean over calls and steps is logged under its name."""
        if _OF_RUNS.fullmatch(str(name)):
            raise RewardError(
                f"log_metric({name!r}): bondlm's own metrics have names like this one (docs/rewards.md#functions), "
                "choose another"
            )
        try:
            self._metrics.setdefault(str(name), []).append(float(value))
        except (TypeError, ValueError) as error:
            raise RewardError(f"log_metric({name!r}, {value!r}): give one number") from error
