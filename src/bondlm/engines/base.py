"""The engine seam: token ids in, token ids out, for each role of the model."""

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
    logprobs: list[float]  # log-probability of each under the distribution it was drawn from, nats
    finished: bool  # False: cut at `max_new_tokens` without an end-of-sequence token

    @property
    def logprob(self) -> float:
        """Log-probability of the whole completion."""
        return sum(self.logprobs)


class Engine(Protocol):
    """Draws completions, of one role or of several at once: what the rest of bondlm asks of an engine, and no more."""

    on_prompts_done: Callable[[int], object] | None
    """Told, while it draws, how many more prompts have all their completions of a role; None: not told."""

    @property
    def exact(self) -> bool:
        """Whether a completion's log-probabilities are those that the trainer's own model gives, up to rounding.

        If not, the trainer computes them anew where they enter the loss.
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
            wanted: role -> (completions of each prompt, one seed per prompt). A sample is a function of the role's
                weights, its prompt, its seed and its number alone, not of the batch that it was drawn in.
            max_new_tokens: most tokens of a completion, end-of-sequence included.
            temperature: 1 samples the model's own distribution, 0 is greedy.

        Returns:
            role -> P lists of completions.
        """

    def close(self) -> None:
        """End connections and processes that the engine holds; it draws nothing afterwards."""


@runtime_checkable
class RemoteEngine(Engine, Protocol):
    """An engine with weights of its own: it must be given ours before it draws."""

    def sync(self) -> None:
        """Take over the trainer's weights as they are now."""
