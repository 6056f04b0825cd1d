"""BOND on a table: the paper's claims (Sessa et al. 2024, arXiv 2407.14622) where the truth is known exactly.

    OMP_NUM_THREADS=1 python examples/tabular_study.py [--out runs/tabular_study] [--quick]

A table of P prompts with K answers each. An answer has features and a real-valued reward; the policy is log-linear in
the features, as a language model is in its last layer, so it must generalise and cannot hit Best-of-N exactly. Training
draws samples and uses bondlm's objectives as the trainer does; what is *plotted* is exact, computed from the tables.
Each run is done in S worlds (other tables, other draws); lines are means over them, bands their range. Writes
figure.png and figure.svg (needs `pip install bondlm[report]`); prints, claim by claim, in how many worlds it holds.

Shapes: S worlds, P prompts, K answers, D features, B = S * P rows of a step, M samples of a row.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tabular_figure
import torch
from tabular_claims import check_claims
from torch import Tensor

from bondlm.bestofn import best_of_n_probs, kl_bound, mean_signal
from bondlm.objectives import BOND, JBOND, Objective

NUM_WORLDS, NUM_PROMPTS, NUM_ANSWERS, NUM_FEATURES = 3, 48, 200, 48
EVERY = 5  # steps between exact evaluations
N = 8  # the order in X1 and X3


class Worlds(NamedTuple):
    """The truth."""

    features_SPKD: Tensor
    ref_logits_SPK: Tensor
    rewards_SPK: Tensor
    log_p_SPK: Tensor  # log p_<= of each answer under the reference, exact


@dataclass(frozen=True)
class Run:
    """Exact numbers of one training run, each (S, T): T evaluations, the first before any step."""

    steps: np.ndarray
    log_quantile: np.ndarray
    kl: np.ndarray  # KL(policy || reference)
    forward: np.ndarray  # KL(Best-of-N || policy)
    backward: np.ndarray  # KL(policy || Best-of-N)

    def of_world(self, i: int) -> "Run":
        """The run in one world alone."""
        return Run(self.steps, *(x[i : i + 1] for x in (self.log_quantile, self.kl, self.forward, self.backward)))


def make_worlds() -> Worlds:
    """Answers with a hidden position; reward, reference and features are different smooth functions of it."""
    worlds = [_make_world(seed) for seed in range(NUM_WORLDS)]
    features, ref_logits, rewards = (torch.stack(part) for part in zip(*worlds, strict=True))
    return Worlds(features, ref_logits, rewards, mean_signal(ref_logits.softmax(-1), rewards, 2))


def _make_world(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(NUM_PROMPTS, NUM_ANSWERS, 3)
    features = torch.tanh(hidden @ normal(3, NUM_FEATURES) + 0.7 * normal(NUM_FEATURES))
    rewards = hidden @ normal(3) + 0.6 * torch.sin(2 * hidden[..., 0]) + 0.1 * normal(NUM_PROMPTS, NUM_ANSWERS)
    ref_logits = 0.6 * torch.tanh(hidden @ normal(3)) + 0.3 * normal(NUM_PROMPTS, NUM_ANSWERS)
    return features, ref_logits, rewards


# -- training, with the library's objectives


def train(
    worlds: Worlds,
    objective: Objective,
    steps: int,
    *,
    order: float = N,
    anchor: Callable[[int, Tensor, Tensor], Tensor] = lambda step, anchor, policy: anchor,
    learned_quantile: bool = False,
    lr: float = 0.003,
) -> Run:
    """Train a policy a world from the reference; `anchor(step, anchor, policy)` says where the anchor goes.

    `order` is the N of the Best-of-N that the two KLs are measured to.
    """
    theta = torch.zeros(NUM_WORLDS, NUM_FEATURES, dtype=torch.float64, requires_grad=True)
    anchor_theta = theta.detach().clone()
    head = torch.zeros(NUM_WORLDS, NUM_FEATURES + 1, dtype=torch.float64, requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": [theta], "lr": lr}, {"params": [head], "lr": 0.05}]
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(1)
    best_SPK = best_of_n_probs(worlds.ref_logits_SPK.softmax(-1), worlds.rewards_SPK, order)
    history = [evaluate(worlds, theta.detach(), best_SPK)]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        draws = draw(worlds, objective, theta, anchor_theta, generator)
        loss = step_loss(worlds, objective, draws, head if learned_quantile else None)
        loss.backward()
        optimizer.step()
        anchor_theta = anchor(step, anchor_theta, theta.detach().clone())
        if step % EVERY == 0:
            history.append(evaluate(worlds, theta.detach(), best_SPK))
    columns = np.stack(history).transpose(2, 1, 0)  # measure, world, evaluation
    return Run(np.arange(len(history)) * EVERY, *columns)


class Draws(NamedTuple):
    """The samples of a step, world by world and prompt by prompt."""

    outcomes_BM: Tensor
    rewards_BM: Tensor
    noise_BM: Tensor
    logp_BK: Tensor
    anchor_logp_BK: Tensor


def logp(worlds: Worlds, theta_SD: Tensor) -> Tensor:
    """Log-probabilities (S, P, K) of all answers."""
    return (worlds.ref_logits_SPK + torch.einsum("spkd,sd->spk", worlds.features_SPKD, theta_SD)).log_softmax(-1)


def draw(
    worlds: Worlds, objective: Objective, theta: Tensor, anchor_theta: Tensor, generator: torch.Generator
) -> Draws:
    """What the objective's plan asks for: the policy's samples first, then the anchor's."""
    plan = objective.plan
    logp_BK, anchor_logp_BK = (logp(worlds, t).flatten(0, 1) for t in (theta, anchor_theta))
    parts = [
        torch.multinomial(table.detach().exp(), count, replacement=True, generator=generator)
        for table, count in ((logp_BK, plan.policy), (anchor_logp_BK, plan.anchor))
        if count
    ]
    outcomes_BM = torch.cat(parts, dim=1)
    rewards_BM = worlds.rewards_SPK.flatten(0, 1).gather(1, outcomes_BM)
    noise_BM = torch.rand(outcomes_BM.shape, generator=generator, dtype=torch.float64)
    return Draws(outcomes_BM, rewards_BM, noise_BM, logp_BK, anchor_logp_BK)


def step_loss(worlds: Worlds, objective: Any, draws: Draws, head_SE: Tensor | None) -> Tensor:
    """The objective's mean loss, with the baseline inside each world; with a head, also its cross-entropy."""
    selection = objective.select(draws.rewards_BM, draws.noise_BM)
    rows, signal = selection.rows_PL, selection.signal_PC
    learned_BL = draws.outcomes_BM.gather(1, rows)
    extra = torch.zeros((), dtype=torch.float64)
    if head_SE is not None:
        # Appendix B.1: p_<=(y) as a model of the answer, from one reference sample a prompt (Eq. 25).
        chosen = worlds.features_SPKD.flatten(0, 1)[torch.arange(len(learned_BL)), learned_BL[:, 0]]
        weights = head_SE.repeat_interleave(NUM_PROMPTS, 0)
        logit = (chosen * weights[:, 1:]).sum(1) + weights[:, 0]
        label = (draws.rewards_BM[:, 1] <= draws.rewards_BM[:, 0]).double()
        extra = torch.nn.functional.binary_cross_entropy_with_logits(logit, label) * NUM_WORLDS
        signal = (objective.n - 1) * torch.nn.functional.logsigmoid(logit.detach())[:, None]
    logp_BL = draws.logp_BK.gather(1, learned_BL)
    compare = objective.plan.compare
    anchor_logp_BC = draws.anchor_logp_BK.detach().gather(1, learned_BL[:, :compare])
    returns = objective.returns(signal, logp_BL[:, :compare].detach(), anchor_logp_BC)
    baseline = torch.cat([objective.baseline(part) for part in returns.chunk(NUM_WORLDS)])
    loss_B = objective.loss(logp_BL, anchor_logp_BC, signal, baseline).loss_P
    return loss_B.sum() / NUM_PROMPTS + extra


def evaluate(worlds: Worlds, theta: Tensor, best_SPK: Tensor) -> np.ndarray:
    """Mean log-quantile, KL to the reference, forward and backward KL to Best-of-N: exact, (S, 4)."""
    logp_SPK = logp(worlds, theta)
    probs, ref_logp = logp_SPK.exp(), worlds.ref_logits_SPK.log_softmax(-1)
    measures = [
        probs * worlds.log_p_SPK,
        probs * (logp_SPK - ref_logp),
        best_SPK * (best_SPK.log() - logp_SPK),
        probs * (logp_SPK - best_SPK.log()),
    ]
    return torch.stack([m.sum(-1).mean(-1) for m in measures], dim=-1).numpy()


def best_of_n_curve(worlds: Worlds, orders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL to the reference and mean log-quantile of Best-of-N itself, for real N: the curve that nothing can beat."""
    ref = worlds.ref_logits_SPK.softmax(-1)
    laws = [best_of_n_probs(ref, worlds.rewards_SPK, float(n)) for n in orders]
    kls = [float((law * (law / ref).log().nan_to_num(0.0)).sum(-1).mean()) for law in laws]
    return np.array(kls), np.array([float((law * worlds.log_p_SPK).sum(-1).mean()) for law in laws])


def ema(eta: float) -> Callable[[int, Tensor, Tensor], Tensor]:
    """An EMA anchor (Eq. 18)."""
    return lambda step, anchor, policy: (1 - eta) * anchor + eta * policy


def periodic(every: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    """A copied anchor (Algorithm 1)."""
    return lambda step, anchor, policy: policy if step % every == 0 else anchor


# -- the experiments


def run_all(worlds: Worlds, scale: float) -> dict[str, dict[str, Run]]:
    """Every training run of the study; `scale` shortens them all."""

    def steps(count: int) -> int:
        return max(3 * EVERY, int(count * scale) // EVERY * EVERY)

    def jbond(gamma: float, eta: float) -> Run:
        return train(worlds, JBOND(gamma=gamma), steps(300), anchor=ema(eta), lr=0.01)

    x1 = {f"β = {beta:g}": train(worlds, BOND(n=N, beta=beta), steps(500)) for beta in (0.0, 0.5, 1.0)}
    x2 = {f"N = {n}": train(worlds, BOND(n=n), steps(900), order=n) for n in (4, 8, 16)}
    x2 |= {f"n = {n} iterated": train(worlds, BOND(n=n), steps(900), anchor=periodic(steps(225))) for n in (2, 4)}
    # 8 anchor samples for the forward term; the head's one label is made from the first of them.
    learned = train(worlds, BOND(n=N, num_anchor_samples=2), steps(500), learned_quantile=True)
    x3 = {"Monte Carlo": x1["β = 0.5"], "learned": learned}
    x5 = {f"η = {eta:g}": jbond(0.0, eta) for eta in (0.01, 0.05, 0.1)}
    x6 = {"γ = 0": x5["η = 0.05"]} | {f"γ = {gamma:g}": jbond(gamma, 0.05) for gamma in (0.5, 1.0, 2.0)}
    return {"x1": x1, "x2": x2, "x3": x3, "x5": x5, "x6": x6}


def reward_curves() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """X8: the exact mean of each estimate against the true quantile p, on a table with one answer for each p."""
    p, rewards = np.arange(1, 401) / 400, np.arange(400.0)
    table = np.full(400, 1 / 400)
    return {
        "log p": (p, np.log(p)),
        "two-level, k = 2 (Eq. 17)": (p, mean_signal(table, rewards, 2, estimate="jbond", k=2)),
        "harmonic, k = 2": (p, mean_signal(table, rewards, 2, estimate="harmonic", k=2)),
        "harmonic, k = 16": (p, mean_signal(table, rewards, 2, estimate="harmonic", k=16)),
        "clamped, k = 16": (p, mean_signal(table, rewards, 2, estimate="clamped", k=16)),
    }


X8 = reward_curves()


def print_yardsticks(worlds: Worlds, runs: dict[str, dict[str, Run]], yardsticks: dict[int, float]) -> None:
    """Exact Best-of-N of this table beside the closed forms of continuous rewards."""
    kls, _ = best_of_n_curve(worlds, np.array(list(yardsticks)))
    print("exact yardsticks         mean log p   (−1/N)    KL to reference   (log N − (N−1)/N)")
    for (n, value), kl in zip(yardsticks.items(), kls, strict=True):
        print(f"  Best-of-{n:<12} {value:13.3f} {-1 / n:9.3f} {kl:15.3f} {kl_bound(n):15.3f}")
    print(f"  N={N}: KLs at the start   forward {last_start(runs, 'forward'):.3f} ({kl_bound(N):.3f})", end="")
    print(f"   backward {last_start(runs, 'backward'):.3f} ({N - 1 - np.log(N):.3f})\n")


def last_start(runs: dict[str, dict[str, Run]], measure: str) -> float:
    """The measure before any step, policy = reference."""
    return float(getattr(runs["x1"]["β = 0.5"], measure)[:, 0].mean())


def print_claims(runs: dict[str, dict[str, Run]]) -> None:
    """Each claim judged on the means over worlds, and in each world by itself."""
    alone = [
        check_claims({x: {name: run.of_world(i) for name, run in group.items()} for x, group in runs.items()}, X8)
        for i in range(NUM_WORLDS)
    ]
    for claim, *each in zip(check_claims(runs, X8), *alone, strict=True):
        count = sum(c.holds for c in each)
        word = "holds" if count == NUM_WORLDS else "DOES NOT" if count == 0 else "mixed"
        verdict = f"{word:8} {count}/{NUM_WORLDS}"
        print(f"{claim.experiment}  {verdict}  {claim.text}\n{'':18}{claim.numbers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tabular_study"))
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps: to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, worlds = time.perf_counter(), make_worlds()
    runs = run_all(worlds, 0.1 if options.quick else 1.0)
    yardsticks = {n: float(best_of_n_curve(worlds, np.array([n]))[1][0]) for n in (2, 4, 8, 16)}
    print_yardsticks(worlds, runs, yardsticks)
    print_claims(runs)
    curve = best_of_n_curve(worlds, np.geomspace(1, 150, 80))
    figure = tabular_figure.draw_figure(runs, curve, X8, yardsticks, N)
    print(f"\n{', '.join(map(str, tabular_figure.save(figure, options.out)))}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
