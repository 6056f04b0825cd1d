"""Samples and log-probabilities of a trainer's models outside of its steps."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from datasets import Dataset
from torch import Tensor

from bondlm.engines import Role
from bondlm.rewards import NamedReward
from bondlm.rollout.samples import Samples
from bondlm.rollout.seeds import Seeds
from bondlm.training.processes import World, gather_in_order
from bondlm.training.saving import SavingTrainer
from bondlm.training.step import Step


class SamplingTrainer(SavingTrainer):
    """Trainer, whose policy, anchor and reference answer prompts and score answers."""

    step: Step
    world: World
    rewards: Sequence[NamedReward]
    args: Any

    def sample(
        self,
        rows: Sequence[Mapping[str, Any]],
        role: Role,
        num_samples: int,
        *,
        temperature: float = 1.0,
        reference: Samples | None = None,
        drop: bool = False,
    ) -> Samples:
        """Draw and score completions of encoded rows outside training; the prompts are shared among the processes.

        Each process draws for `per_device_eval_batch_size` prompts together.
        Rewards that rank do so among the samples of `reference`, if given; `drop` marks prompts whose reward fails
        instead of raising.
        """
        mine = self.world.mine(len(rows))
        seeds = Seeds.of_evaluation(self.args.seed, temperature)
        most = max(1, math.ceil(len(rows) / self.world.size))  # of a process: all make the same number of calls
        num_parts = math.ceil(most / (self.args.per_device_eval_batch_size or most))
        drawn = self.step.draw([rows[i] for i in mine], {role: num_samples}, seeds, mine, temperature, num_parts)
        return self.step.score(rows, gather_in_order(self.world, mine, drawn), reference=reference, drop=drop)

    def score_completions(self, rows: Sequence[Mapping[str, Any]], completions: list[list[Any]]) -> Samples:
        """Decode and score completions of encoded rows."""
        return self.step.score(rows, completions)

    def log_probability(self, samples: Samples, role: Role) -> Tensor:
        """Log pi_role(y) (P, m) of samples `y`, whichever model drew them, nats."""
        pairs = zip(samples.prompt_ids, samples.completions, strict=True)
        return self.step.logprob(role, [(prompt, [c.ids for c in row]) for prompt, row in pairs])

    def log_ratio(self, samples: Samples, role: Role = "reference") -> Tensor:
        """Log pi(y) - log pi_role(y) (P, m) of the policy's samples `y`: its mean estimates KL(policy || role), k1."""
        return self.log_probability(samples, "policy") - self.log_probability(samples, role)

    def held_out_samples(self, dataset: Dataset) -> tuple[Samples, Samples]:
        """Policy and reference samples of encoded prompts; the reference's are drawn once a run, it never moves.

        Rewards that ask for the state of training are asked about them again.
        """
        rows, key = list(dataset), dataset._fingerprint
        if key not in self._reference_samples:
            self._reference_samples[key] = self.sample(rows, "reference", self.args.eval_num_reference_samples)
        reference = self._reference_samples[key]
        if any(reward.follows_training for reward in self.rewards):
            reference = self.score_completions(rows, reference.completions)
        return self.sample(rows, "policy", self.args.eval_num_samples, reference=reference), reference

    @cached_property
    def _reference_samples(self) -> dict[str, Samples]:
        """By the fingerprint of their prompts."""
        return {}
