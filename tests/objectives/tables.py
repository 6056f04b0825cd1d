"""Tables on which every objective is run: the real objective on drawn or enumerated outcomes, and the exact gradient.

Shapes: P prompts (rows of a batch), M samples of each, K outcomes, D all draws of M outcomes.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from bondlm.bestofn import (
    bonbon_fixed_point,
    bonbon_gradient,
    bond_fixed_point,
    bond_gradient,
    grpo_fixed_point,
    grpo_gradient,
    kl_reward_gradient,
    kl_reward_optimum,
    listwise_fixed_point,
    listwise_gradient,
    regression_fixed_point,
    regression_gradient,
    self_bond_fixed_point,
    self_bond_gradient,
)
from bondlm.objectives import (
    BOND,
    GRPO,
    JBOND,
    RLOO,
    VBON,
    BestOfNRegression,
    BestOfNSFT,
    BoNBoN,
    Listwise,
    Reinforce,
    SelfBOND,
)

ANCHOR = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.45, 0.15, 0.25, 0.15], [0.25, 0.25, 0.4, 0.1]], dtype=torch.float64)
REWARDS = torch.tensor([[0.3, -1.0, 2.0, 0.7], [0.0, 1.0, 1.0, 2.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
LOGITS = torch.tensor([[0.3, -0.8, 0.5, 0.2], [0.0, 0.6, -0.9, 0.4], [-0.5, 0.3, 0.1, 0.9]], dtype=torch.float64)
NAMES = ("untied", "tied", "all tied")

OBJECTIVES: dict[str, Any] = {
    "jbond": JBOND(),
    "jbond k=4, gamma": JBOND(beta=0.7, gamma=0.4, num_anchor_samples=4),
    "jbond harmonic": JBOND(beta=0.4, num_anchor_samples=3, log_quantile="harmonic"),
    "bond": BOND(n=3, num_anchor_samples=4),
    "bond n > k, gamma": BOND(n=4, beta=0.8, gamma=0.6, num_anchor_samples=2),
    "bond harmonic, correction": BOND(n=2, beta=0.3, num_anchor_samples=4, log_quantile="harmonic", correction=True),
    "bond forward": BOND(n=3, beta=0.0, num_anchor_samples=2),
    "bond backward": BOND(n=3, beta=1.0, num_anchor_samples=4, correction=True),
    "best_of_n_sft": BestOfNSFT(n=4),
    "reinforce": Reinforce(beta_rl=1.5),
    "rloo": RLOO(beta_rl=0.8),
    "rloo 4 samples": RLOO(beta_rl=2.0, num_samples=4),
    "grpo": GRPO(beta_rl=0.9, num_samples=4),
    "grpo 2 samples": GRPO(beta_rl=0.6, num_samples=2),
    "grpo without std": GRPO(beta_rl=0.8, num_samples=3, scale_rewards="none"),
    "vbon": VBON(n=4, num_anchor_samples=4),
    "bonbon": BoNBoN(n=4, alpha=0.3),
    "regression": BestOfNRegression(n=3, num_samples=4),
    "listwise": Listwise(n=3, num_samples=4),
    "listwise n = 2 samples": Listwise(n=2, num_samples=2),
    "self_bond": SelfBOND(n=3, num_samples=4),
    "self_bond harmonic": SelfBOND(n=2, num_samples=3, log_quantile="harmonic"),
    "self_bond best_of_n": SelfBOND(n=4, num_samples=4, log_quantile="best_of_n"),
}


def bond_keywords(objective: Any) -> dict[str, Any]:
    """What the oracle's BOND must know to stand for J-BOND, BOND, vBoN or Best-of-n fine-tuning."""
    kind = type(objective).__name__
    if kind == "BestOfNSFT":
        return {"n": objective.n, "beta": 0.0}
    if kind == "VBON":
        return {"n": objective.n, "beta": 1.0, "estimate": "smoothed", "k": objective.num_anchor_samples}
    keywords = {"n": objective.n, "beta": objective.beta, "gamma": objective.gamma}
    keywords |= {"estimate": objective.log_quantile, "k": objective.num_anchor_samples}
    return keywords | {"correction": kind == "BOND" and objective.correction}


def exact_gradient(objective: Any, logits: Tensor, anchor: Tensor, rewards: Tensor) -> Tensor:
    """The oracle's expected gradient (..., K) of the objective, chosen by its class's name (a mutant keeps it)."""
    match type(objective).__name__:
        case "Reinforce" | "RLOO":
            return kl_reward_gradient(logits, anchor, rewards, objective.beta_rl)
        case "BoNBoN":
            return bonbon_gradient(logits, anchor, rewards, objective.n, objective.alpha)
        case "BestOfNRegression":
            return regression_gradient(logits, anchor, rewards, objective.n, objective.num_samples)
        case "Listwise":
            return listwise_gradient(logits, anchor, rewards, objective.n, objective.num_samples)
        case "GRPO":
            settings = objective.beta_rl, objective.num_samples, objective.scale_rewards
            return grpo_gradient(logits, anchor, rewards, *settings)
        case "SelfBOND":
            settings = objective.n, objective.num_samples, objective.log_quantile
            return self_bond_gradient(logits, anchor, rewards, *settings)
        case _:
            return bond_gradient(logits, anchor, rewards, **bond_keywords(objective))


def exact_fixed_point(objective: Any, anchor: Tensor, rewards: Tensor) -> Tensor:
    """The oracle's fixed point (..., K) for a still anchor."""
    match type(objective).__name__:
        case "Reinforce" | "RLOO":
            return kl_reward_optimum(anchor, rewards, objective.beta_rl)
        case "BoNBoN":
            return bonbon_fixed_point(anchor, rewards, objective.n, objective.alpha)
        case "BestOfNRegression":
            return regression_fixed_point(anchor, rewards, objective.n, objective.num_samples)
        case "Listwise":
            return listwise_fixed_point(anchor, rewards, objective.n, objective.num_samples)
        case "GRPO":
            return grpo_fixed_point(anchor, rewards, objective.beta_rl, objective.num_samples, objective.scale_rewards)
        case "SelfBOND":
            return self_bond_fixed_point(anchor, rewards, objective.n, objective.num_samples, objective.log_quantile)
        case _:
            return bond_fixed_point(anchor, rewards, **bond_keywords(objective))


def loss_on(
    objective: Any,
    outcomes_PM: Tensor,
    noise_PM: Tensor,
    logits_PK: Tensor,
    anchor_PK: Tensor,
    rewards_PK: Tensor,
    use_baseline: bool = True,
) -> Any:
    """The objective's loss on given outcomes, by its own four functions as the trainer calls them."""
    compare = objective.plan.compare
    selection = objective.select(rewards_PK.gather(1, outcomes_PM), noise_PM)
    learned_PL = outcomes_PM.gather(1, selection.rows_PL)
    logp_PL = logits_PK.log_softmax(-1).gather(1, learned_PL)
    anchor_logp_PC = anchor_PK.log().gather(1, learned_PL[:, :compare])
    returns_PC = objective.returns(selection.signal_PC, logp_PL[:, :compare].detach(), anchor_logp_PC)
    baseline_PC = objective.baseline(returns_PC) if use_baseline else torch.zeros_like(returns_PC)
    return objective.loss(logp_PL, anchor_logp_PC, selection.signal_PC, baseline_PC)


def enumerated_gradient(
    objective: Any, logits_K: Tensor, anchor_K: Tensor, rewards_K: Tensor, use_baseline: bool | None = None
) -> Tensor:
    """The mean gradient (K,) over all K^M draws of one prompt, each weighted by its probability: no sampling error.

    Ties go to the first: the outcome's distribution is that of ties broken at random. `use_baseline` is for baselines
    inside a prompt; one over the batch would mix draws. The baseline of SelfBOND and GRPO is part of their signal: by
    default it is used.
    """
    use_baseline = type(objective).__name__ in ("SelfBOND", "GRPO") if use_baseline is None else use_baseline
    plan = objective.plan
    draws_DM = torch.tensor(list(itertools.product(range(len(anchor_K)), repeat=plan.total)))
    policy_K = logits_K.softmax(-1)
    weights_D = policy_K[draws_DM[:, : plan.policy]].prod(1) * anchor_K[draws_DM[:, plan.policy :]].prod(1)
    noise_DM = torch.linspace(0.9, 0.1, plan.total, dtype=torch.float64).expand(len(draws_DM), -1)
    leaf_K = logits_K.clone().requires_grad_()
    tables = [row_K.expand(len(draws_DM), -1) for row_K in (leaf_K, anchor_K, rewards_K)]
    loss_D = loss_on(objective, draws_DM, noise_DM, *tables, use_baseline=use_baseline).loss_P
    return torch.autograd.grad((loss_D * weights_D).sum(), leaf_K)[0]


def draw(plan: Any, logits_PK: Tensor, anchor_PK: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(P, M) outcomes, the policy's first, and the noise that breaks ties."""
    parts = [
        torch.multinomial(probs_PK, count, replacement=True, generator=generator)
        for probs_PK, count in ((logits_PK.softmax(-1), plan.policy), (anchor_PK, plan.anchor))
        if count
    ]
    outcomes_PM = torch.cat(parts, dim=1)
    return outcomes_PM, torch.rand(outcomes_PM.shape, dtype=torch.float64, generator=generator)


def sampled_gradients(objective: Any, draws_per_table: int, seed: int) -> Tensor:
    """(tables, draws, K): each draw's gradient, all in one batch of different prompts, baseline included."""
    generator = torch.Generator().manual_seed(seed)
    logits, anchor, rewards = (table.repeat(draws_per_table, 1) for table in (LOGITS, ANCHOR, REWARDS))
    leaf_PK = logits.clone().requires_grad_()
    outcomes_PM, noise_PM = draw(objective.plan, logits, anchor, generator)
    loss = loss_on(objective, outcomes_PM, noise_PM, leaf_PK, anchor, rewards)
    (gradient_PK,) = torch.autograd.grad(loss.loss_P.sum(), leaf_PK)
    return gradient_PK.view(draws_per_table, len(LOGITS), -1).transpose(0, 1)


def standard_errors_off(gradient_DK: Tensor, exact_K: Tensor) -> float:
    """Largest distance of the mean over draws from the exact gradient, in standard errors."""
    error_K = gradient_DK.std(0) / math.sqrt(len(gradient_DK))
    # A term without noise (all tied: no signal) has no standard error, only rounding.
    return float(((gradient_DK.mean(0) - exact_K).abs() / error_K.clamp(min=1e-13)).max())
