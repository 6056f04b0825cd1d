"""Samples and log-probabilities of a trainer's models outside its steps."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from bondlm.engines import Role
from bondlm.engines.together import together
from bondlm.models.logprobs import Group
from bondlm.objectives.rules import check, one_of
from bondlm.objectives.rules import temperature as temperature_rule
from bondlm.rewards import NamedReward
from bondlm.rollout.parts import joined, part_of
from bondlm.rollout.samples import Samples
from bondlm.rollout.seeds import ROLE_NUMBER, Seeds
from bondlm.training.held_out import HeldOut, compare
from bondlm.training.metrics import completion_metrics
from bondlm.training.processes import World, gather_in_order
from bondlm.training.saving import SavingTrainer
from bondlm.training.step import Step


class SamplingTrainer(SavingTrainer):
    """A Trainer whose policy, anchor and reference can answer prompts and score answers."""

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
        """Draw and score completions of encoded rows outside training; the prompts are divided among the processes.

        Each process draws for `per_device_eval_batch_size` prompts at a time, and scores only its own. Rewards that
        rank do so among the samples of `reference`, if given; with `drop`, prompts whose reward fails are marked
        instead of raising.

        Raises:
            ConfigError: there is no such role, or the temperature is neither 0 (greedy) nor at least 0.01.
        """
        asked = SimpleNamespace(role=role, temperature=temperature)
        check(asked, role=one_of(*ROLE_NUMBER), temperature=temperature_rule())
        mine = self.world.mine(len(rows))
        seeds = Seeds.of_evaluation(self.args.seed, temperature)
        most = max(1, math.ceil(len(rows) / self.world.size))  # per process, since all make the same number of calls
        num_parts = math.ceil(most / (self.args.per_device_eval_batch_size or most))
        with self.step.clock.apart():
            drawn = self.step.draw([rows[i] for i in mine], {role: num_samples}, seeds, mine, temperature, num_parts)
            return self._scored(rows, mine, drawn, reference=reference, drop=drop)

    def score_completions(
        self,
        rows: Sequence[Mapping[str, Any]],
        completions: list[list[Any]],
        rewards: Sequence[NamedReward] | None = None,
    ) -> Samples:
        """Decode and score completions of encoded rows, by the run's rewards or by `rewards`, if given."""
        mine = self.world.mine(len(rows))
        with self.step.clock.apart():
            return self._scored(rows, mine, [completions[i] for i in mine], rewards=rewards)

    def _scored(
        self,
        rows: Sequence[Mapping[str, Any]],
        mine: list[int],
        completions: list[list[Any]],
        *,
        reference: Samples | None = None,
        **how: Any,
    ) -> Samples:
        """The scored samples of all rows from all processes; each scores the completions of its own rows."""
        compared = None if reference is None else part_of(reference, mine)
        part = self.step.score([rows[i] for i in mine], completions, reference=compared, **how)
        return joined(self.world.gather_objects([(mine, part)]))

    def log_probability(self, samples: Samples, role: Role) -> Tensor:
        """Log pi_role(y) (P, m) of samples `y`, whichever model drew them, nats; divided among the processes."""
        mine = self.world.mine(len(samples.prompts))
        groups: list[Group] = [(samples.prompt_ids[i], [c.ids for c in samples.completions[i]]) for i in mine]
        with self.step.clock.apart(), together(self.world):
            own = self.step.logprob(role, groups)
        return torch.tensor(gather_in_order(self.world, mine, own.tolist()), dtype=own.dtype)

    def log_ratio(self, samples: Samples, role: Role = "reference") -> Tensor:
        """Log pi(y) - log pi_role(y) (P, m) of the policy's samples `y`: its mean estimates KL(policy || role), k1."""
        return self.log_probability(samples, "policy") - self.log_probability(samples, role)

    def held_out_samples(self, dataset: Dataset) -> tuple[Samples, Samples]:
        """Policy and reference samples of encoded prompts; the reference's are drawn once per run, as it never changes.

        If a reward has used the training state, the rewards score them again.
        """
        rows, key = list(dataset), dataset._fingerprint
        if key not in self._reference_samples:
            self._reference_samples[key] = self.sample(rows, "reference", self.args.eval_num_reference_samples)
        elif self.world.any(self.step.trainer_state.was_read):
            reference = self._reference_samples[key]
            self._reference_samples[key] = self.score_completions(rows, reference.completions)
        reference = self._reference_samples[key]
        return self.sample(rows, "policy", self.args.eval_num_samples, reference=reference), reference

    def measured(self, dataset: Dataset) -> tuple[HeldOut, dict[str, float]]:
        """The measures of the policy on encoded prompts, and further metrics of its samples."""
        with self.average.in_place(), self.step.clock.apart() as seconds:
            policy, reference = self.held_out_samples(dataset)
            log_ratio = self.log_ratio(policy)
        others = completion_metrics(policy.flat) | policy.metrics | {"runtime": sum(seconds.values())}
        return compare(policy, reference, log_ratio), others

    @cached_property
    def _reference_samples(self) -> dict[str, Samples]:
        """The reference's samples, by the fingerprint of their prompts."""
        return {}
