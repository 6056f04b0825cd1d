"""BOND on a table: the paper's claims (Sessa et al. 2024, arXiv 2407.14622) where the truth is known exactly.

    OMP_NUM_THREADS=1 python examples/tabular_study.py [--out runs/tabular_study] [--quick]

A table of P prompts with K answers each. An answer has features and a real-valued reward; the policy is log-linear in
the features, as a language model is in its last layer, so it must generalise and cannot hit Best-of-N exactly. Training
draws samples and uses bondlm's objectives as the trainer does; what is *plotted* is exact, computed from the tables.
Bands are the range over seeds. Writes figure.png and figure.svg (needs `pip install bondlm[report]`) and prints, claim by
claim, whether it holds here.

Shapes: S seeds, P prompts, K answers, D features, B = S * P rows of a step, M samples of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bondlm.bestofn import best_of_n_probs, mean_signal
from bondlm.objectives import Objective

NUM_SEEDS, NUM_PROMPTS, NUM_ANSWERS, NUM_FEATURES = 3, 48, 200, 32
EVERY = 10  # steps between exact evaluations
N = 8  # the order in X1 and X3


class World(NamedTuple):
    """The truth, shared by all seeds."""

    features_PKD: Tensor
    ref_logits_PK: Tensor
    rewards_PK: Tensor
    log_p_PK: Tensor  # log p_<= of each answer under the reference, exact


@dataclass(frozen=True)
class Run:
    """Exact numbers of one training run, each (S, T): T evaluations, the first before any step."""

    steps: np.ndarray
    log_quantile: np.ndarray
    kl: np.ndarray  # KL(policy || reference)
    forward: np.ndarray  # KL(Best-of-N || policy)
    backward: np.ndarray  # KL(policy || Best-of-N)


def make_world(seed: int = 0) -> World:
    """Answers with a hidden position; reward, reference and features are different smooth functions of it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(NUM_PROMPTS, NUM_ANSWERS, 3)
    features = torch.tanh(hidden @ normal(3, NUM_FEATURES) + 0.7 * normal(NUM_FEATURES))
    rewards = hidden @ normal(3) + 0.6 * torch.sin(2 * hidden[..., 0]) + 0.2 * normal(NUM_PROMPTS, NUM_ANSWERS)
    ref_logits = 0.6 * torch.tanh(hidden @ normal(3)) + 0.3 * normal(NUM_PROMPTS, NUM_ANSWERS)
    return World(features, ref_logits, rewards, mean_signal(ref_logits.softmax(-1), rewards, 2))


# -- training, with the library's objectives


def train(
    world: World,
    objective: Objective,
    steps: int,
    *,
    order: float = N,
    anchor: Callable[[int, Tensor, Tensor], Tensor] = lambda step, anchor, policy: anchor,
    learned_quantile: bool = False,
    lr: float = 0.03,
) -> Run:
    """Train a policy a seed from the reference; `anchor(step, anchor, policy)` says where the anchor goes.

    `order` is the N of the Best-of-N that the two KLs are measured to.
    """
    theta = torch.zeros(NUM_SEEDS, NUM_FEATURES, dtype=torch.float64, requires_grad=True)
    anchor_theta = theta.detach().clone()
    head = torch.zeros(NUM_SEEDS, NUM_FEATURES + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [theta]}, {"params": [head], "lr": 0.1}], lr=lr)
    generator = torch.Generator().manual_seed(1)
    best_PK = best_of_n_probs(world.ref_logits_PK.softmax(-1), world.rewards_PK, order)
    history = [evaluate(world, theta.detach(), best_PK)]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        draws = draw(world, objective, theta, anchor_theta, generator)
        loss = step_loss(world, objective, draws, head if learned_quantile else None)
        loss.backward()
        optimizer.step()
        anchor_theta = anchor(step, anchor_theta, theta.detach().clone())
        if step % EVERY == 0:
            history.append(evaluate(world, theta.detach(), best_PK))
    columns = np.stack(history).transpose(2, 1, 0)  # measure, seed, evaluation
    return Run(np.arange(len(history)) * EVERY, *columns)


class Draws(NamedTuple):
    """The samples of a step, seed by seed and prompt by prompt."""

    outcomes_BM: Tensor
    rewards_BM: Tensor
    noise_BM: Tensor
    logp_BK: Tensor
    anchor_logp_BK: Tensor


def logp(world: World, theta_SD: Tensor) -> Tensor:
    """Log-probabilities (S, P, K) of all answers."""
    return (world.ref_logits_PK + torch.einsum("pkd,sd->spk", world.features_PKD, theta_SD)).log_softmax(-1)


def draw(world: World, objective: Objective, theta: Tensor, anchor_theta: Tensor, generator: torch.Generator) -> Draws:
    """What the objective's plan asks for: the policy's samples first, then the anchor's."""
    plan = objective.plan
    logp_BK, anchor_logp_BK = (logp(world, t).flatten(0, 1) for t in (theta, anchor_theta))
    parts = [
        torch.multinomial(table.detach().exp(), count, replacement=True, generator=generator)
        for table, count in ((logp_BK, plan.policy), (anchor_logp_BK, plan.anchor))
        if count
    ]
    outcomes_BM = torch.cat(parts, dim=1)
    rewards_BM = world.rewards_PK.repeat(NUM_SEEDS, 1).gather(1, outcomes_BM)
    noise_BM = torch.rand(outcomes_BM.shape, generator=generator, dtype=torch.float64)
    return Draws(outcomes_BM, rewards_BM, noise_BM, logp_BK, anchor_logp_BK)


def step_loss(world: World, objective: Any, draws: Draws, head_SE: Tensor | None) -> Tensor:
    """The objective's mean loss, with the baseline inside each seed; with a head, also its cross-entropy."""
    rows, signal = objective.select(draws.rewards_BM, draws.noise_BM)
    learned_BL = draws.outcomes_BM.gather(1, rows)
    extra = torch.zeros((), dtype=torch.float64)
    if head_SE is not None:
        # Appendix B.1: p_<=(y) as a model of the answer, from one reference sample a prompt (Eq. 25).
        chosen = world.features_PKD.repeat(NUM_SEEDS, 1, 1)[torch.arange(len(learned_BL)), learned_BL[:, 0]]
        weights = head_SE.repeat_interleave(NUM_PROMPTS, 0)
        logit = (chosen * weights[:, 1:]).sum(1) + weights[:, 0]
        label = (draws.rewards_BM[:, 1] <= draws.rewards_BM[:, 0]).double()
        extra = torch.nn.functional.binary_cross_entropy_with_logits(logit, label) * NUM_SEEDS
        signal = (objective.n - 1) * torch.nn.functional.logsigmoid(logit.detach())[:, None]
    logp_BL = draws.logp_BK.gather(1, learned_BL)
    compare = objective.plan.compare
    anchor_logp_BC = draws.anchor_logp_BK.detach().gather(1, learned_BL[:, :compare])
    returns = objective.returns(signal, logp_BL[:, :compare].detach(), anchor_logp_BC)
    baseline = torch.cat([objective.baseline(part) for part in returns.chunk(NUM_SEEDS)])
    loss_B = objective.loss(logp_BL, anchor_logp_BC, signal, baseline).loss_P
    return loss_B.sum() / NUM_PROMPTS + extra


def evaluate(world: World, theta: Tensor, best_PK: Tensor) -> np.ndarray:
    """Mean log-quantile, KL to the reference, forward and backward KL to Best-of-N: exact, (S, 4)."""
    logp_SPK = logp(world, theta)
    probs, ref_logp = logp_SPK.exp(), world.ref_logits_PK.log_softmax(-1)
    measures = [
        probs * world.log_p_PK,
        probs * (logp_SPK - ref_logp),
        best_PK * (best_PK.log() - logp_SPK),
        probs * (logp_SPK - best_PK.log()),
    ]
    return torch.stack([m.sum(-1).mean(-1) for m in measures], dim=-1).numpy()


def best_of_n_curve(world: World, orders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL to the reference and mean log-quantile of Best-of-N itself, for real N: the curve that nothing can beat."""
    ref = world.ref_logits_PK.softmax(-1)
    laws = [best_of_n_probs(ref, world.rewards_PK, float(n)) for n in orders]
    kls = [float((law * (law / ref).log().nan_to_num(0.0)).sum(-1).mean()) for law in laws]
    return np.array(kls), np.array([float((law * world.log_p_PK).sum(-1).mean()) for law in laws])


def ema(eta: float) -> Callable[[int, Tensor, Tensor], Tensor]:
    """An EMA anchor (Eq. 18)."""
    return lambda step, anchor, policy: (1 - eta) * anchor + eta * policy


def periodic(every: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    """A copied anchor (Algorithm 1)."""
    return lambda step, anchor, policy: policy if step % every == 0 else anchor


# -- the experiments


def run_all(world: World, scale: float) -> dict[str, dict[str, Run]]:
    """Every training run of the study; `scale` shortens them all."""

    def steps(count: int) -> int:
        return max(EVERY, int(count * scale) // EVERY * EVERY)

    copy = max(EVERY, int(150 * scale))
    x1 = {f"β = {beta:g}": train(world, BOND(n=N, beta=beta), steps(500)) for beta in (0.0, 0.5, 1.0)}
    x2 = {f"N = {n}": train(world, BOND(n=n), steps(900), order=n) for n in (4, 8, 16)}
    x2 |= {f"n = {n}, iterated": train(world, BOND(n=n), steps(900), anchor=periodic(copy)) for n in (2, 4)}
    # 8 anchor samples for the forward term; the head's one label is made from the first of them.
    learned = train(world, BOND(n=N, num_anchor_samples=2), steps(500), learned_quantile=True)
    x3 = {"MC, k = 16": x1["β = 0.5"], "learned": learned}
    x5 = {f"η = {eta:g}": train(world, JBOND(), steps(600), anchor=ema(eta)) for eta in (0.01, 0.05, 0.1)}
    x6 = {f"γ = {g:g}": train(world, JBOND(gamma=g), steps(600), anchor=ema(0.05)) for g in (0.0, 0.5, 1.0, 2.0)}
    return {"x1": x1, "x2": x2, "x3": x3, "x5": x5, "x6": x6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tabular_study"))
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps: to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = make_world()
    runs = run_all(world, 0.1 if options.quick else 1.0)
    print(runs)


if __name__ == "__main__":
    main()
