"""The experiments: which runs each is made of.

All runs of a task draw the same number of completions per step and take the same number of steps, so their steps cost
the same in generated tokens. A method that draws many completions per prompt sees fewer prompts per step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS_OF_A_STEP = 96
Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of an experiment, without its seed."""

    name: str
    settings: Settings
    times_steps: float = 1.0  # steps, as a multiple of the other runs'
    own_evaluation: bool = False  # evaluate during training, for target_n and kl_budget
    lora_r: int | None = None  # train an adapter of this rank instead of all weights


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A claim and the runs that test it."""

    task: str
    claim: str
    runs: list[Run]
    both_kls: bool = False  # measure KLs to Best-of-n in both directions
    targets: tuple[int, ...] = field(default=(4, 8))


def bond(n: int, beta: float = 0.5, **more: Any) -> Settings:
    """BOND with a fixed anchor: the target is Best-of-n of the reference itself."""
    return {"objective": "bond", "n": n, "beta": beta, "anchor": "fixed"} | more


def iterated(n: int, every: int = 10) -> Settings:
    """BOND whose anchor is a copy of the policy, renewed every `every` steps."""
    return bond(n) | {"anchor": "periodic", "anchor_update_every": every}


def jbond(eta: float | None = 0.05, **more: Any) -> Settings:
    """J-BOND; eta is None where the anchor is copied, not averaged."""
    return {"objective": "jbond"} | ({} if eta is None else {"eta": eta}) | more


def rloo(beta_rl: float, samples: int = 3, **more: Any) -> Settings:
    """RLOO with a KL penalty to the reference, unless another anchor is given."""
    return {"objective": "rloo", "beta_rl": beta_rl, "num_samples": samples, "anchor": "fixed"} | more


def regression(n: int, samples: int, **more: Any) -> Settings:
    """Best-of-n by regression on the log-quantiles of the reference's samples."""
    return {"objective": "best_of_n_regression", "n": n, "num_samples": samples, "anchor": "fixed"} | more


def named(**runs: Settings) -> list[Run]:
    return [Run(name=name.replace("__", "-"), settings=settings) for name, settings in runs.items()]


X1 = [Run(name=f"n{n}-beta{beta}", settings=bond(n, beta)) for n in (4, 8) for beta in (0.0, 0.5, 1.0)]
X2 = [Run(name=f"fixed-n{n}", settings=bond(n)) for n in (4, 8, 16)] + [
    Run(name=f"iterated-n{n}", settings=iterated(n)) for n in (2, 4)
]
X3 = [
    Run(name="monte-carlo", settings=bond(8)),
    Run(name="learned", settings=bond(8, quantile="learned")),
]
X4 = named(ema=jbond(0.1), periodic=jbond(None, anchor="periodic", anchor_update_every=10))
X5 = [Run(name=f"eta{eta}", settings=jbond(eta)) for eta in (0.02, 0.1, 0.3)]
X6 = [Run(name="gamma0.0", settings=jbond(0.1))] + [  # same run as in X5
    Run(name=f"gamma{gamma}", settings=jbond(0.1, gamma=gamma)) for gamma in (0.5, 2.0)
]
X7 = (
    named(jbond=jbond(0.1))
    + [Run(name="jbond-eta0.3", settings=jbond(0.3))]
    + [  # the two above are also in X5
        Run(name=f"rloo-beta{beta}", settings=rloo(beta, samples=2)) for beta in (0.001, 0.01, 0.1, 1.0)
    ]
)
X9 = [
    Run(name="jbond-eta0.05", settings=jbond(0.05)),
    Run(name="jbond-eta0.3", settings=jbond(0.3)),
    *(Run(name=f"rloo-beta{beta}", settings=rloo(beta)) for beta in (0.1, 0.3, 1.0)),
    Run(name="rloo-ema-beta0.3", settings=rloo(0.3, anchor="ema", eta=0.05)),
    Run(name="bond-n8", settings=bond(8)),
    Run(name="iterated-n2", settings=iterated(2) | {"num_anchor_samples": 8}),
    Run(name="vbon-n8", settings={"objective": "vbon", "n": 8, "anchor": "fixed"}),
    Run(name="bonbon-n8", settings={"objective": "bonbon", "n": 8, "anchor": "fixed"}),
    Run(name="best-of-8-sft", settings={"objective": "best_of_n_sft", "n": 8, "anchor": "fixed"}),
    Run(name="best-of-4-sft-ema", settings={"objective": "best_of_n_sft", "n": 4, "anchor": "ema", "eta": 0.3}),
    Run(name="reinforce-beta0.3", settings={"objective": "reinforce", "beta_rl": 0.3, "anchor": "fixed"}),
]
# Candidates for reaching N sooner, or at less KL, than X9's jbond-eta0.3.
FAST = [
    Run(name="eta0.3-beta0.8", settings=jbond(0.3, beta=0.8)),
    # Many samples per prompt, and a loss whose noise vanishes where the policy is Best-of-n.
    Run(name="regression-n4-m8", settings=regression(4, 8)),
    Run(name="regression-n8-m8", settings=regression(8, 8)),
    Run(name="regression-n8-m8-decay", settings=regression(8, 8, lr_scheduler_type="linear")),
    # Noise in a step costs KL: more and smaller steps, or fewer trained directions.
    Run(name="eta0.1-slow", settings=jbond(0.1, learning_rate=3e-5), times_steps=3),
    Run(name="rloo-beta0.3-slow", settings=rloo(0.3, learning_rate=3e-5), times_steps=3),
    Run(name="eta0.3-decay", settings=jbond(0.3, lr_scheduler_type="linear"), times_steps=1.5),
    Run(name="eta0.3-lora4", settings=jbond(0.3, learning_rate=2e-3), lora_r=4),
    Run(name="rloo-beta0.3-lora4", settings=rloo(0.3, learning_rate=2e-3), lora_r=4),
    Run(name="eta0.3-lora1", settings=jbond(0.3, learning_rate=4e-3), lora_r=1),
]
# A hackable reward, optimised far past its use, and three ways to stop.
_HACK = jbond(1.0, learning_rate=3e-4)
OVER = [
    Run(name="free", settings=_HACK, times_steps=1.5),
    Run(name="target-n4", settings=_HACK | {"target_n": 4.0}, times_steps=1.5, own_evaluation=True),
    Run(name="kl-budget1", settings=_HACK | {"kl_budget": 1.0}, times_steps=1.5, own_evaluation=True),
    Run(name="gamma2", settings=_HACK | {"gamma": 2.0}, times_steps=1.5),
    # With eta 1 the anchor is the policy of one step ago, so penalizing the distance to it holds nothing back.
    Run(name="eta0.1-gamma2", settings=_HACK | {"eta": 0.1, "gamma": 2.0}, times_steps=1.5),
]

EXPERIMENTS = {
    "x1": Experiment(
        task="summarization",
        claim="beta = 0.5 brings both KLs to Best-of-N down; its log-quantile is near that of beta = 1, above beta = 0",
        runs=X1,
        both_kls=True,
    ),
    "x2": Experiment(
        task="summarization",
        claim="with N fixed, reward and log-quantile saturate; iterated BOND keeps rising, faster for n = 4",
        runs=X2,
    ),
    "x3": Experiment(
        task="summarization",
        claim="a learned quantile does as well as 16 Monte-Carlo samples (N = 8)",
        runs=X3,
        both_kls=True,
        targets=(8,),
    ),
    "x4": Experiment(task="dialogue", claim="EMA anchor: same reward as a copied one, lower KL", runs=X4),
    "x5": Experiment(task="dialogue", claim="a larger eta makes the reward grow faster", runs=X5),
    "x6": Experiment(
        task="dialogue", claim="a larger gamma makes the KL grow slower, at a better reward per KL", runs=X6
    ),
    "x7": Experiment(
        task="dialogue", claim="J-BOND's reward at equal KL lies above REINFORCE's at four beta_RL", runs=X7
    ),
    "x9": Experiment(
        task="summarization",
        claim="all methods at equal numbers of generated completions (asked by reviewers)",
        runs=X9,
    ),
    "fast": Experiment(
        task="summarization", claim="which settings of ours reach N soonest and cheapest in KL", runs=FAST
    ),
    "over": Experiment(
        task="hackable",
        claim="judges turn when a hackable reward is pushed; target_n, kl_budget and gamma stop in time",
        runs=OVER,
    ),
}


def runs(names: list[str]) -> Iterator[tuple[str, Experiment, Run]]:
    """(name, experiment, run) for each run of the named experiments."""
    for name in names:
        for run in EXPERIMENTS[name].runs:
            yield name, EXPERIMENTS[name], run
