"""Warnings about problems that the numbers of a run do not show: at its start, at its first step, and on ties."""

import logging
from typing import Any

import torch
from transformers import TrainerCallback

from bondlm.objectives import Objective
from bondlm.rewards.constant import constant_rewards
from bondlm.training.callbacks import RunFolderCallback
from bondlm.training.signal_factor import MAX_FACTOR, MAX_TIED

_log = logging.getLogger(__name__)

# `TiesCallback` warns if so much of the rewards ties, for so many steps. With three samples of a prompt, of which a
# fifth of the pairs tie, half of the prompts have a tie.
TIED_PAIRS, TIED_PROMPTS, TIED_STEPS = 0.2, 0.5, 10
LONG_AT_MOST = 50  # steps at the largest factor before `OutOfReachCallback` warns
LONG_WARMUP = 0.5  # share of a run


class FirstStepCallback(TrainerCallback):
    """Warns at the start of a run that never reaches its learning rate, has no baseline, or has a constant reward."""

    def __init__(self, objective: Objective, run_folder: RunFolderCallback) -> None:
        """`run_folder` has the samples of the current step."""
        self._objective, self._run_folder, self._has_looked = objective, run_folder, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the settings once the length of the run is known."""
        self._has_looked = not state.is_world_process_zero
        if self._has_looked:
            return
        if (text := warmup_warning(args, state.max_steps, begun=state.global_step)) is not None:
            _log.warning("%s", text)
        if (text := anchor_warning(args, state.max_steps)) is not None:
            _log.warning("%s", text)
        prompts = args.world_size * args.train_batch_size * args.gradient_accumulation_steps
        if prompts == 1 and needs_other_prompts(self._objective):
            _log.warning(
                "per_device_train_batch_size=1 with gradient_accumulation_steps=%d on %d process: each step has one "
                "prompt, so there is no baseline (the mean return of the step's other prompts) and gradients are "
                "noisy. Raise one of them",
                args.gradient_accumulation_steps,
                args.world_size,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the first step, which is drawn and scored but not learned from yet."""
        rollout = self._run_folder.rollout
        if self._has_looked or rollout is None:
            return
        self._has_looked = True
        samples, kept_P = rollout.samples, rollout.samples.kept
        kept = kept_P.nonzero()[:, 0].tolist()
        text = constant_rewards(samples.rewards_PM[kept_P], [samples.texts[i] for i in kept], samples.prompts)
        if text is not None:
            _log.warning("step %d: %s", state.global_step + 1, text)


def warmup_warning(args: Any, max_steps: int, *, begun: int = 0) -> str | None:
    """A warning if the warm-up takes half of a run of `max_steps` or more; None once it is over."""
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    warmup = args.get_warmup_steps(max_steps)
    if schedule == "constant" or begun >= warmup or warmup < LONG_WARMUP * max_steps or warmup <= 1:
        return None
    reached = min(1.0, max_steps / warmup)
    rate = "" if args.learning_rate is None else f" of learning_rate={args.learning_rate:g}"
    return (
        f"warmup_steps={args.warmup_steps:g} of a run of {max_steps} steps: "
        + (f"it ends at {reached:.0%}{rate}" if reached < 1 else f"it learns with less{rate} for half of it or more")
        + f". Set warmup_steps to a tenth of the run ({max(1, max_steps // 10)}), or make the run longer"
    )


def anchor_warning(args: Any, max_steps: int) -> str | None:
    """A warning if a periodic anchor is never copied before the last step of a run of `max_steps`."""
    if args.anchor != "periodic" or args.anchor_update_every < max_steps:
        return None
    return (
        f"anchor_update_every={args.anchor_update_every} of a run of {max_steps} steps: the anchor never moves, as "
        f"with anchor='fixed'. Set anchor_update_every below {max_steps}, or make the run longer"
    )


def needs_other_prompts(objective: Objective) -> bool:
    """Whether the objective's baseline of a prompt comes from other prompts' returns, and is 0 without any."""
    compared = objective.plan.compare
    if objective.plan.policy == 0 or compared == 0:
        return False
    alone, among_others = (objective.baseline(torch.ones(prompts, compared)) for prompts in (1, 2))
    return not alone.any() and bool(among_others.any())


class TiesCallback(TrainerCallback):
    """Warns of rewards that tie: a run learns nothing from them, although all its other numbers look fine."""

    def __init__(self) -> None:
        """Each further warning needs ten times as many steps as the previous one."""
        self._untied, self._enough = 0, TIED_STEPS

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from here."""
        self._untied = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Check how much tied since the last log."""
        seen = logs or {}  # if ties also teach, only prompts without any signal count
        name, most, what = "bond/frac_tied", TIED_PAIRS, "pairs of a prompt's samples have equal rewards"
        if "bond/frac_no_signal" in seen:
            name, most, what = "bond/frac_no_signal", TIED_PROMPTS, "prompts have equal rewards for all their samples"
        if (tied := seen.get(name)) is None or not state.is_world_process_zero:
            return
        if not tied > most:
            self._untied = state.global_step
        elif (steps := state.global_step - self._untied) >= self._enough:
            self._enough = 10 * steps
            _log.warning(
                "step %d: %.0f%% of the %s, and it has been more than %.0f%% for %d steps (%s). Equal samples teach "
                "nothing: BOND learns from their order. See whether the reward is constant, or has few values (0/1, "
                "clipped, rounded); use one that is graded, or add a second one that breaks ties (docs/rewards.md)",
                state.global_step,
                100 * tied,
                what,
                100 * most,
                steps,
                name,
            )


class OutOfReachCallback(TrainerCallback):
    """Warns once if an adaptive signal has long been at its maximum while the measured N is still below n.

    It also warns once if so many samples tie that N is not measured and the signal does not adapt.
    """

    def __init__(self, objective: Objective) -> None:
        """`objective` has the target N, if any."""
        self._wanted, self._below, self._measured = objective.plan.steered_to, 0, True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from here."""
        self._below = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Check the means of the steps since the last log."""
        factor = (logs or {}).get("bond/signal_factor")
        if self._wanted is None or factor is None or not state.is_world_process_zero:
            return
        if "bond/effective_n" not in (logs or {}):
            self._warn_of_ties(state.global_step, factor)
            self._below = state.global_step
        elif factor < MAX_FACTOR:
            self._below = state.global_step
        elif state.global_step - self._below >= LONG_AT_MOST:
            _log.warning(
                "step %d: adaptive_strength has kept the signal at its limit, %g times that of n=%d for a free policy, "
                "for %d steps; the measured N is %.1f. The policy needs too much KL for its "
                "win rate, or learns too slowly: ask for a smaller n, or learn longer with more prompts per step",
                state.global_step,
                MAX_FACTOR,
                self._wanted,
                state.global_step - self._below,
                logs["bond/effective_n"],
            )
            self._wanted = None

    def _warn_of_ties(self, step: int, factor: float) -> None:
        if self._measured:
            self._measured = False
            _log.warning(
                "step %d: adaptive_strength does not adapt while more than %.0f%% of the pairs of a prompt's samples "
                "tie: N would be measured too high. The signal stays %.2g times that of n=%d for a free policy; "
                "eval_effective_n says which N is reached. Use a reward that is graded, or choose n by it",
                step,
                100 * MAX_TIED,
                factor,
                self._wanted,
            )
