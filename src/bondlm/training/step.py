"""The part of a training step before any gradient, in the order of Algorithm 2 (Sessa et al. 2024, arXiv 2407.14622).

Shapes: P prompts of this process, M samples of each, C of them compared with the anchor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bondlm.data.columns import LOGGED_IDS, PROMPT_IDS, PROMPT_ROW
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.engines import Completion, Engine, Role
from bondlm.engines.together import together
from bondlm.models.learned_quantile import QuantileModel, completion_features
from bondlm.models.logprobs import Group, by_length, group_logprobs
from bondlm.models.roles import Roles
from bondlm.objectives import LearnedQuantile, Objective, reference_pull
from bondlm.rewards import SUM, Aggregation, NamedReward
from bondlm.rewards.extras import WatchedState
from bondlm.rollout.samples import Samples, SamplingParams, draw, logged_samples, score_samples
from bondlm.rollout.seeds import Seeds
from bondlm.rollout.truncated import treat_truncated
from bondlm.training.clock import Clock, StepMeans
from bondlm.training.dropped import DropBudget
from bondlm.training.micro_batches import MicroBatch
from bondlm.training.processes import World
from bondlm.training.rollout import Rollout
from bondlm.training.signal_factor import SignalFactor


@dataclass(kw_only=True)
class Step:
    """The components of a rollout, and the order in which they are used."""

    objective: Objective
    engine: Engine
    roles: Roles
    rewards: Sequence[NamedReward]
    aggregation: Aggregation
    encoder: PromptEncoder
    world: World
    clock: Clock
    means: StepMeans
    drops: DropBudget
    quantile_model: QuantileModel | None
    signal_factor: SignalFactor | None
    share_prompts: bool  # whether completions of a prompt may share its row
    seed: int
    missing_eos: str
    trainer_state: WatchedState
    gamma_ref: float = 0.0
    multiple: int = 1  # number of tokens to whose multiples rows are padded

    def roll_out(
        self, rows: Sequence[Mapping[str, Any]], step: int, is_real_P: Tensor, *, with_reference: bool
    ) -> Rollout:
        """Do everything in step number `step` that needs no gradient; rows that are not `is_real_P` get no weight."""
        plan, seeds = self.objective.plan, Seeds(self.seed, step)
        positions = [row[PROMPT_ROW] for row in rows]
        # Draw completions of the policy and of the anchor, and score them.
        samples = self._samples(rows, seeds, positions)
        is_counted_P = is_real_P & samples.kept
        # Select those to learn from: for J-BOND the policy's, and the better one of the anchor's.
        selection = self.objective.select(samples.ranked, seeds.tie_noise(positions, plan.total))
        learned = [[samples.completions[i][j] for j in chosen] for i, chosen in enumerate(selection.rows_PL.tolist())]
        compared = [cs[: plan.compare] for cs in learned]
        # Log-probabilities of the compared samples, computed here so that a server's rounding does not enter the
        # returns.
        anchor_logp_PC = self._logprob("anchor", rows, compared)
        if self.engine.exact:
            sampled_logp_PC = torch.tensor([[c.logprob for c in cs] for cs in compared])
        else:
            sampled_logp_PC = self._logprob("policy", rows, compared)
        is_measured = plan.policy > 0 and (with_reference or self.gamma_ref > 0)
        reference_logp_PC = self._logprob("reference", rows, compared) if is_measured else None
        features = None if selection.learned is None else self._features(rows, compared)
        # Everything that may pause the run comes before this line: the step is then repeated, and nothing may count
        # twice.
        self.means.record(self.drops.note(rows, samples, step, is_real_P, self.world))
        # Returns, and their baseline over the prompts of all processes.
        signal_PC = selection.signal_PC.double()  # until the baseline is subtracted, since fp32 rounds large rewards
        if selection.learned is not None and features is not None:
            signal_PC = self._learned_signal(selection.learned, features, is_counted_P)
        if self.signal_factor is not None:
            signal_PC = signal_PC * self.signal_factor.factor
        returns_PC = self.objective.returns(signal_PC, sampled_logp_PC, anchor_logp_PC)
        pull_PC = None
        if self.gamma_ref > 0 and reference_logp_PC is not None:  # pull back to the reference, with the same baseline
            log_ratio_PC = sampled_logp_PC - reference_logp_PC
            pull_PC = reference_pull(log_ratio_PC, self._baseline(log_ratio_PC, is_counted_P), self.gamma_ref)
        return Rollout(
            rows=rows,
            plan=plan,
            samples=samples,
            learned=learned,
            signal_PC=signal_PC,
            sampled_logp_PC=sampled_logp_PC,
            anchor_logp_PC=anchor_logp_PC,
            baseline_PC=self._baseline(returns_PC, is_counted_P),
            reference_logp_PC=reference_logp_PC,
            pull_PC=pull_PC,
            wins_P=selection.wins_P,
            is_real_P=is_real_P,
            is_counted_P=is_counted_P,
            num_passes=(1 if self.engine.exact else 2) + is_measured,
        )

    def pack(self, rollout: Rollout, sizes: Sequence[int], *, mixed_first: bool = False) -> list[MicroBatch]:
        """Split the rollout into micro-batches of these numbers of prompts.

        Prompts of similar length share a batch, since the sum does not depend on which prompts do. With `mixed_first`
        the first batch has the first prompts instead, which are a random part.
        """
        first, groups = sizes[0] if mixed_first else 0, rollout.groups
        order = iter([*range(first), *(place for place in by_length(groups) if place >= first)])
        how: dict[str, Any] = {
            "pad_id": self.encoder.pad_id,
            "start_id": self.encoder.start_id,
            "share_prompts": self.share_prompts,
            "multiple": self.multiple,
        }
        chosen = [list(islice(order, size)) for size in sizes]
        return [MicroBatch(rollout=rollout, groups=groups, chosen=places, **how) for places in chosen]

    def draw(
        self,
        rows: Sequence[Mapping[str, Any]],
        counts: Mapping[Role, int],
        seeds: Seeds,
        positions: Sequence[int],
        temperature: float = 1.0,
        num_parts: int = 1,
    ) -> list[list[Completion]]:
        """Draw completions of each encoded row, with the given numbers per role and of engine calls."""
        params = SamplingParams(max_new_tokens=self.encoder.max_completion_length, seeds=seeds, temperature=temperature)
        with self.clock("generate"):
            return draw(self.engine, rows, counts, params, positions, num_parts)

    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        completions: list[list[Completion]],
        *,
        rewards: Sequence[NamedReward] | None = None,
        drop: bool = False,
        reference: Samples | None = None,
    ) -> Samples:
        """Decode and score completions of encoded rows, by the run's rewards or by others.

        Ranks are counted among the samples of `reference`, if given; with `drop`, prompts whose reward fails are marked
        instead of raising.
        """
        with self.clock("reward"), together(self.world):
            how: dict[str, Any] = {"encoder": self.encoder, "trainer_state": self.trainer_state}
            how |= {"aggregation": self.aggregation if rewards is None else SUM, "reference": reference}
            return score_samples(self.rewards if rewards is None else rewards, rows, completions, drop=drop, **how)

    def logprob(self, role: Role, groups: list[Group]) -> Tensor:
        """Log-probability (P, C) under `role` of C completions of each prompt, nats, whichever model drew them."""
        if groups and not groups[0][1]:
            return torch.zeros(len(groups), 0)
        asked = groups if self.share_prompts else [(p, [completion]) for p, cs in groups for completion in cs]
        how: dict[str, Any] = {
            "start_id": self.encoder.start_id,
            "device": self.world.device,
            "multiple": self.multiple,
        }
        with self.clock("reference"), self.roles.use(role) as model:  # all processes come here, even without groups
            if not groups:
                return torch.zeros(0, 0)
            return group_logprobs(model, asked, self.encoder.pad_id, **how).view(len(groups), -1)

    def _logprob(
        self, role: Role, rows: Sequence[Mapping[str, Any]], compared: Sequence[Sequence[Completion]]
    ) -> Tensor:
        pairs = zip(rows, compared, strict=True)
        return self.logprob(role, [(row[PROMPT_IDS], [c.ids for c in cs]) for row, cs in pairs])

    def _samples(self, rows: Sequence[Mapping[str, Any]], seeds: Seeds, positions: Sequence[int]) -> Samples:
        """The logged samples if the data has them, otherwise newly drawn and scored ones."""
        if LOGGED_IDS in rows[0]:
            return logged_samples(rows, self.encoder)
        plan = self.objective.plan
        completions = self.draw(rows, {"policy": plan.policy, "anchor": plan.anchor}, seeds, positions)
        return treat_truncated(self.score(rows, completions, drop=True), self.missing_eos)

    def _baseline(self, returns_PC: Tensor, is_counted_P: Tensor) -> Tensor:
        """The baseline of this process's prompts, from the returns of all prompts that count."""
        everyone, counted = self.world.gather(returns_PC), self.world.gather(is_counted_P)
        baseline = torch.zeros_like(everyone)
        baseline[counted] = self.objective.baseline(everyone[counted])
        first = self.world.rank * len(returns_PC)
        return baseline[first : first + len(returns_PC)]

    def _features(self, rows: Sequence[Mapping[str, Any]], compared: Sequence[Sequence[Completion]]) -> Tensor:
        """The features of each prompt's completion for the learned quantile."""
        pairs = [(row[PROMPT_IDS], c.ids) for row, cs in zip(rows, compared, strict=True) for c in cs]
        how: dict[str, Any] = {"start_id": self.encoder.start_id, "device": self.world.device}
        with self.clock("quantile"), self.roles.use("reference") as reference:
            return completion_features(reference, pairs, self.encoder.pad_id, **how)

    def _learned_signal(self, learned: LearnedQuantile, features: Tensor, is_counted_P: Tensor) -> Tensor:
        """The signal (P, 1) from log p_theta, followed by one training step of p_theta, equal on every process."""
        assert self.quantile_model is not None  # noqa: S101  created if the plan asks for it
        device, counted = self.world.device, self.world.gather(is_counted_P)
        with self.clock("quantile"):
            log_p = self.quantile_model.log_quantile(features)
            everyone = self.world.gather(features), self.world.gather(learned.labels_P.float())
            loss = self.quantile_model.update(*(tensor[counted].to(device) for tensor in everyone))
        mean = float(self.world.gather(log_p)[counted].exp().mean())
        metrics = {"bond/quantile_loss": loss, "bond/quantile_mean": mean}
        self.means.record(metrics, weight=float(abs(loss) < float("inf")))
        return learned.signal(log_p.cpu().unsqueeze(1))
