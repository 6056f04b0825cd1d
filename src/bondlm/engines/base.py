"""The interface of engines: token ids in, token ids out, for each role of the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Role = Literal["policy", "anchor", "reference"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    Example: `Completion(ids=[504, 3575, 2], logprobs=[-1.2, -0.3, -0.1], finished=True)`.
    """

    ids: list[int]  # the sampled tokens, up to and including the end-of-sequence token
    logprobs: list[float]  # log-probability of each token under the distribution it was drawn from, nats
    finished: bool  # False: cut at `max_new_tokens` without an end-of-sequence token

    @property
    def logprob(self) -> float:
        """Log-probability of the whole completion."""
        return sum(self.logprobs)


class Engine(Protocol):
    """Draws completions for one role or for several at once; this is all that bondlm needs from an engine."""

    on_prompts_done: Callable[[int], object] | None
    """Called while it draws with the number of further prompts that have all completions of a role, unless None."""

    @property
    def exact(self) -> bool:
        """Whether the log-probabilities of a completion equal those of the trainer's own model, up to rounding.

        If not, the trainer recomputes them where the loss needs them.
        """

    def generate_roles(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Mapping[Role, tuple[int, Sequence[int]]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
    ) -> dict[Role, list[list[Completion]]]:
        """Draw completions of each prompt, from each role.

        Args:
            prompts: P prompts as token ids.
            wanted: role -> (completions of each prompt, one seed per prompt). A sample depends only on the role's
                weights, its prompt, its seed and its number, not on the batch that it is drawn in.
            max_new_tokens: maximum tokens of a completion, end-of-sequence included.
            temperature: 1 samples the model's own distribution, 0 is greedy.

        Returns:
            role -> P lists of completions.
        """

    def close(self) -> None:
        """End the engine's connections and processes; it cannot draw afterwards."""


@runtime_checkable
class RemoteEngine(Engine, Protocol):
    """An engine with its own copy of the weights, which must be synchronised with ours before it draws."""

    def sync(self) -> None:
        """Take over the trainer's current weights."""
