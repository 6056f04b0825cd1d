"""The runs of the study "win rate against KL", most informative first.

One seed of every run, in this order, then more seeds of the leaders and of the baselines they must beat.
"""

from dataclasses import dataclass
from typing import Any

from plans import Settings, iterated, jbond, rloo

COMPLETIONS = 192  # per step
STEPS = 480


@dataclass(frozen=True, kw_only=True)
class FrontierRun:
    """A method with its settings; `falls`: its learning rate falls to 0 over the last third."""

    settings: Settings
    falls: bool = False
    learning_rate: float = 1e-4

    def as_settings(self, steps: int) -> dict[str, Any]:
        """The settings for `BONDConfig`, for a run of so many steps."""
        schedule: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup"}
        if self.falls:
            schedule = {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": max(1, steps // 3), "decay_type": "linear"},
            }
        return {"learning_rate": self.learning_rate} | schedule | self.settings


def own(n: int, samples: int = 8, **more: Any) -> Settings:
    """BOND with the policy's own quantiles: Best-of-n as a fixed point."""
    return {"objective": "self_bond", "n": n, "num_samples": samples} | more


def grpo(beta_rl: float) -> Settings:
    """GRPO with a KL penalty to the reference."""
    return {"objective": "grpo", "beta_rl": beta_rl, "num_samples": 8, "anchor": "fixed"}


def listwise(n: int, samples: int, **more: Any) -> Settings:
    """Fit the samples' log-ratios to Best-of-n's weights for their ranks."""
    return {"objective": "listwise", "n": n, "num_samples": samples} | more


RUNS = {
    "rloo-0.3": FrontierRun(settings=rloo(0.3)),
    "jbond-eta0.3": FrontierRun(settings=jbond(0.3)),
    "own-n4-fall": FrontierRun(settings=own(4), falls=True),
    "rloo-0.6-fall": FrontierRun(settings=rloo(0.6), falls=True),
    "own-n8-fall": FrontierRun(settings=own(8), falls=True),
    "rloo-0.3-fall": FrontierRun(settings=rloo(0.3), falls=True),
    "rloo-0.45-fall": FrontierRun(settings=rloo(0.45), falls=True),
    "own-n4": FrontierRun(settings=own(4)),
    "own-n4-k4": FrontierRun(settings=own(4, 4)),
    "own-n16": FrontierRun(settings=own(16)),
    "rloo-0.1": FrontierRun(settings=rloo(0.1)),
    "rloo-1": FrontierRun(settings=rloo(1.0)),
    "reinforce-0.3": FrontierRun(settings={"objective": "reinforce", "beta_rl": 0.3, "anchor": "fixed"}),
    "best-of-4-sft-ema": FrontierRun(settings={"objective": "best_of_n_sft", "n": 4, "anchor": "ema", "eta": 0.3}),
    "rloo-0.3-lr2": FrontierRun(settings=rloo(0.3), learning_rate=2e-4),
    "own-n4-lr2": FrontierRun(settings=own(4), learning_rate=2e-4),
    "rloo-0.3-lr4": FrontierRun(settings=rloo(0.3), learning_rate=4e-4),
    "own-n4-lr4": FrontierRun(settings=own(4), learning_rate=4e-4),
    # A softmax over samples, with the reference or a moving anchor; and slower learning, which cost less KL on sums.
    "listwise-n8-fall": FrontierRun(settings=listwise(8, 8, anchor="fixed"), falls=True),
    "listwise-n2-eta0.3": FrontierRun(settings=listwise(2, 3, eta=0.3)),
    "rloo-0.3-slow": FrontierRun(settings=rloo(0.3), learning_rate=3e-5),
    "own-n8-slow": FrontierRun(settings=own(8), learning_rate=3e-5),
    # The strength of the signal follows the measured N.
    "own-n4-adaptive-fall": FrontierRun(settings=own(4, adaptive_strength=True), falls=True),
    "own-n8-adaptive-fall": FrontierRun(settings=own(8, adaptive_strength=True), falls=True),
    # As many samples per prompt as the best of ours; and other candidates for the lead.
    "rloo-0.3-k8-fall": FrontierRun(settings=rloo(0.3, 8), falls=True),
    "own-n8": FrontierRun(settings=own(8)),
    "own-n8-fall-lr2": FrontierRun(settings=own(8), falls=True, learning_rate=2e-4),
    "own-n4-harmonic-fall": FrontierRun(settings=own(4, log_quantile="harmonic"), falls=True),
    "jbond-eta0.3-fall": FrontierRun(settings=jbond(0.3), falls=True),
    "rloo-0.1-fall": FrontierRun(settings=rloo(0.1), falls=True),
    # What completes the comparison: GRPO, a moving anchor with a pull to the reference, and anchors that are copied.
    "rloo-0.2-fall": FrontierRun(settings=rloo(0.2), falls=True),
    "grpo-0.1-fall": FrontierRun(settings=grpo(0.1), falls=True),
    "grpo-0.3-fall": FrontierRun(settings=grpo(0.3), falls=True),
    "grpo-0.6-fall": FrontierRun(settings=grpo(0.6), falls=True),
    "jbond-eta0.3-ref0.5-fall": FrontierRun(settings=jbond(0.3, gamma_ref=0.5), falls=True),
    "jbond-eta0.3-ref1-fall": FrontierRun(settings=jbond(0.3, gamma_ref=1.0), falls=True),
    "own-n2-fall": FrontierRun(settings=own(2), falls=True),
    "iterated-n2-every60": FrontierRun(settings=iterated(2, 60)),
    "iterated-n4-every60": FrontierRun(settings=iterated(4, 60)),
}
# Once every run has one seed, these get more, in this order: claims rest on them.
SEEDED = (
    *("own-n4-adaptive-fall", "own-n8-adaptive-fall", "rloo-0.3-fall", "rloo-0.45-fall", "rloo-0.6-fall"),
    *("own-n4-fall", "own-n8-fall", "jbond-eta0.3", "rloo-0.3-k8-fall", "rloo-0.3", "own-n16", "own-n4"),
    *("rloo-0.1-fall", "own-n8-fall-lr2"),
)


def queue(names: list[str] | None, seeds: list[int]) -> list[tuple[str, int]]:
    """(run, seed) in order: named runs seed by seed, or all runs with the first seed, then `SEEDED` with the others."""
    if names:
        return [(name, seed) for seed in seeds for name in names]
    return [(name, seeds[0]) for name in RUNS] + [(name, seed) for seed in seeds[1:] for name in SEEDED]
