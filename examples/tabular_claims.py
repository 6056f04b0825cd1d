"""The paper's claims that `tabular_study.py` can judge, each with a criterion that could fail."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Runs = Mapping[str, Any]  # name -> `tabular_study.Run`
Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]


class Claim(NamedTuple):
    """One sentence of the paper, whether it holds here, and the numbers."""

    experiment: str
    text: str
    holds: bool
    numbers: str


def last(run: Any, measure: str) -> float:
    """Mean over worlds of the last five evaluations."""
    return float(getattr(run, measure)[:, -5:].mean())


def at_kl(run: Any, kl: float) -> float:
    """Log-quantile at a given KL to the reference, on the run's mean curve up to where it first gets there."""
    kls = np.maximum.accumulate(run.kl.mean(0))
    return float(np.interp(kl, kls, run.log_quantile.mean(0)))


def late_gain(run: Any) -> float:
    """Share of a run's whole gain in log-quantile that falls into its last third."""
    mean = run.log_quantile.mean(0)
    return float((mean[-5:].mean() - mean[2 * len(mean) // 3]) / (mean[-5:].mean() - mean[0]))


def steps_to(run: Any, share: float) -> int:
    """First evaluated step with that share of the run's own gain."""
    mean = run.log_quantile.mean(0)
    return int(run.steps[np.argmax(mean - mean[0] >= share * (mean[-5:].mean() - mean[0]))])


def listing(runs: Runs, value: Callable[[Any], float], digits: int = 3) -> str:
    """Numbers of several runs in one line."""
    return ", ".join(f"{name}: {value(run):.{digits}f}" for name, run in runs.items())


def check_claims(runs: Mapping[str, Runs], rewards: Curves) -> list[Claim]:
    """Each claim with a criterion that could fail."""
    return [*_jeffreys_claims(runs["x1"]), *_iterated_claims(runs["x2"]), *_other_claims(runs, rewards)]


def _jeffreys_claims(x1: Runs) -> list[Claim]:
    forward, backward, quantile = (
        [last(run, m) for run in x1.values()] for m in ("forward", "backward", "log_quantile")
    )
    start = next(iter(x1.values()))
    numbers = f"forward {start.forward[:, 0].mean():.2f} -> {forward[1]:.3f}, "
    numbers += f"backward {start.backward[:, 0].mean():.2f} -> {backward[1]:.3f}"
    lowered = forward[1] < start.forward[:, 0].mean() / 2 and backward[1] < start.backward[:, 0].mean() / 2
    apart = abs(quantile[1] - quantile[2]) < abs(quantile[1] - quantile[0])
    return [
        Claim("X1", "β = 0.5 brings both KLs down", lowered, numbers),
        Claim(
            "X1",
            "each single-KL run leaves its other KL higher (by 10% or more)",
            backward[0] > 1.1 * backward[1] and forward[2] > 1.1 * forward[1],
            f"backward {listing(x1, lambda r: last(r, 'backward'))}; "
            f"forward {listing(x1, lambda r: last(r, 'forward'))}",
        ),
        Claim(
            "X1",
            "log-quantile of β = 0.5 is nearer to β = 1 than to β = 0, and above β = 0",
            apart and quantile[1] > quantile[0],
            listing(x1, lambda r: last(r, "log_quantile")),
        ),
    ]


def _iterated_claims(x2: Runs) -> list[Claim]:
    fixed = {name: run for name, run in x2.items() if "iterated" not in name}
    moving = {name: run for name, run in x2.items() if "iterated" in name}
    small, large = moving.values()
    reach = [steps_to(run, 0.95) for run in fixed.values()]
    top = 0.95 * min(last(fixed["N = 16"], "kl"), last(small, "kl"))
    gaps = [at_kl(small, kl) - at_kl(fixed["N = 16"], kl) for kl in np.linspace(0.3, top, 20)]
    return [
        Claim("X2", "fixed N saturates", max(map(late_gain, fixed.values())) < 0.03, "share of the gain in the last "
              f"third: {listing(fixed, late_gain)}"),
        Claim("X2", "smaller N saturates earlier", reach[0] <= reach[1] <= reach[2] and reach[0] < reach[2],
              f"steps to 95% of its gain: {listing(fixed, lambda r: steps_to(r, 0.95), 0)}"),
        Claim("X2", "iterated Best-of-2 keeps rising", late_gain(small) > 0.05, listing(moving, late_gain)),
        Claim("X2", "n = 4 rises faster than n = 2", last(large, "log_quantile") > last(small, "log_quantile"),
              listing(moving, lambda r: last(r, "log_quantile"))),
        Claim("X2", "iterated and fixed runs lie on one log-quantile/KL curve (to 0.03)", max(map(abs, gaps)) < 0.03,
              f"n = 2 iterated minus N = 16 at equal KL: {min(gaps):+.3f} to {max(gaps):+.3f}"),
    ]  # fmt: skip


def _other_claims(runs: Mapping[str, Runs], rewards: Curves) -> list[Claim]:
    monte_carlo, learned = runs["x3"].values()
    relative = {m: last(learned, m) / last(monte_carlo, m) - 1 for m in ("forward", "backward", "log_quantile")}
    half = {name: run.log_quantile[:, len(run.steps) // 2].mean() for name, run in runs["x5"].items()}
    kls = [last(run, "kl") for run in runs["x6"].values()]
    equal = 0.95 * min(kls)
    paid = {name: at_kl(run, equal) for name, run in runs["x6"].items()}
    p, reward = rewards["two-level, k = 2 (Eq. 17)"]
    gap = reward - np.log(p)
    return [
        Claim("X3", "learned quantile: KLs and log-quantile very comparable (10%)",
              max(map(abs, relative.values())) < 0.1, ", ".join(f"{m} {v:+.0%}" for m, v in relative.items())),
        Claim("X5", "larger η rises faster", bool(np.all(np.diff(list(half.values())) > 0)),
              "log-quantile at half time: " + ", ".join(f"{name}: {v:.3f}" for name, v in half.items())),
        Claim("X6", "larger γ: KL grows slower", bool(np.all(np.diff(kls) < 0)),
              f"KL at the end: {listing(runs['x6'], lambda r: last(r, 'kl'), 2)}"),
        Claim("X6", "larger γ: more log-quantile at equal KL", bool(np.all(np.diff(list(paid.values())) > 0)),
              f"at {equal:.2f} nats: " + ", ".join(f"{name}: {v:.4f}" for name, v in paid.items())),
        Claim("X8", "mean two-level reward is −log 16 (1−p)², meets log p at ½ and at 1",
              bool(np.allclose(reward, -np.log(16) * (1 - p) ** 2) and abs(gap[[199, 399]]).max() < 1e-12),
              f"largest error for p ≥ ¼: {abs(gap[99:]).max():.3f}; at p = 0.01: {gap[3]:+.2f} (log p is −∞ at 0)"),
    ]  # fmt: skip
