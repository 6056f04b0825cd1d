"""The engine seam: token ids in, token ids out, for one role of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Role = Literal["policy", "anchor", "reference"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    Example: `Completion(ids=[504, 3575, 2], logprobs=[-1.2, -0.3, -0.1], finished=True)`.
    """

    ids: list[int]  # the sampled tokens, up to and including the end-of-sequence token
    logprobs: list[float]  # log-probability of each under the law it was drawn from, nats
    finished: bool  # False: cut at `max_new_tokens` without an end-of-sequence token

    @property
    def logprob(self) -> float:
        """Log-probability of the whole completion."""
        return sum(self.logprobs)


class Engine(Protocol):
    """Draws completions, of one role or of several at once."""

    @property
    def exact(self) -> bool:
        """Whether a completion's log-probabilities are those that the trainer's own model gives, up to rounding.

        If not, the trainer computes them anew where they enter the loss.
        """

    def close(self) -> None:
        """End connections and processes that the engine holds; it draws nothing afterwards."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        *,
        role: Role,
        max_new_tokens: int,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> list[list[Completion]]:
        """Draw `num_samples` completions of each prompt.

        Args:
            prompts: P prompts as token ids.
            num_samples: completions of each prompt.
            role: whose law to draw from.
            max_new_tokens: most tokens of a completion, end-of-sequence included.
            seeds: one integer per prompt. A sample is a function of the weights, its prompt, its seed and its number
                alone, not of the batch that it was drawn in.
            temperature: 1 samples the model's law, 0 is greedy.

        Returns:
            P lists of `num_samples` completions.
        """

    def generate_roles(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Mapping[Role, tuple[int, Sequence[int]]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
    ) -> dict[Role, list[list[Completion]]]:
        """`generate` for each role: role -> (samples of a prompt, one seed for each prompt)."""


@runtime_checkable
class RemoteEngine(Engine, Protocol):
    """An engine with weights of its own: it must be given ours before it draws."""

    def sync(self) -> None:
        """Take over the trainer's weights as they are now."""
