"""Wrong versions of the real source: one term's sign, factor or index changed in the text, then executed.

`MUTATIONS` is the list in docs/theory.md. A mutation is found if `defects` of the wrong objective is not zero.
"""

import importlib
import inspect
import itertools
import sys
from dataclasses import fields
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

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

from .tables import ANCHOR, LOGITS, REWARDS, draw, enumerated_gradient, exact_gradient, loss_on


class Mutation(NamedTuple):
    """In `module`, `old` becomes `new`; the objective `objective` is then wrong."""

    objective: Any
    module: str  # of bondlm
    old: str
    new: str
    what: str


_JBOND, _BOND = JBOND(beta=0.4, gamma=0.7), BOND(n=3, beta=0.4, gamma=0.7, num_anchor_samples=3, correction=True)
_JEFFREYS = [
    ("forward = -logp_best", "forward = logp_best", "forward term"),
    ("backward = -logp * advantage", "backward = logp * advantage", "backward term"),
    ("regulariser = logp * log_ratio", "regulariser = -logp * log_ratio", "regulariser, as Algorithm 2 prints it"),
    ("logp.detach() - anchor_logp_PC.squeeze(1)", "logp.detach() + anchor_logp_PC.squeeze(1)", "anchor's log p"),
    ("logp.detach() - anchor_logp_PC", "-logp.detach() - anchor_logp_PC", "policy's log p in the log-ratio"),
    ("= logp.detach() - anchor", "= logp - anchor", "log-ratio not detached"),
    ("advantage = signal_PC", "advantage = -signal_PC", "signal"),
    ("- log_ratio - baseline", "+ log_ratio - baseline", "log-ratio of the return"),
    ("- baseline_PC.squeeze(1)", "+ baseline_PC.squeeze(1)", "baseline"),
    ("(1 - self.beta) * forward", "self.beta * forward", "weight of the forward term"),
    ("self.beta * backward", "(1 - self.beta) * backward", "weight of the backward term"),
    ("+ self.gamma * regulariser", "", "no regulariser"),
    ("return signal_PC - (", "return -signal_PC - (", "signal in the returns"),
    ("- (logp_PC - anchor_logp_PC)", "+ (logp_PC - anchor_logp_PC)", "log-ratio in the returns"),
    ("return leave_one_out_mean(", "return -leave_one_out_mean(", "baseline's mean"),
]
_SELF = SelfBOND(n=2, num_samples=4, log_quantile="best_of_n")
_GRPO = GRPO(beta_rl=0.7, num_samples=3)
_REWARD = [
    ("- baseline_PC", "+ baseline_PC", "baseline"),
    ("return signal_PC", "return -signal_PC", "reward"),
    ("- self.beta_rl * (", "+ self.beta_rl * (", "KL"),
    ("(logp_PC - anchor_logp_PC)", "(logp_PC + anchor_logp_PC)", "anchor's log p"),
]

MUTATIONS = [
    *(Mutation(_JBOND, "objectives.jbond", *m) for m in _JEFFREYS),
    Mutation(_JBOND, "objectives.jbond", "ties(anchor", "ties(-anchor", "worse, not better"),
    Mutation(
        JBOND(num_anchor_samples=3),
        "objectives.jbond",
        "anchor[:, : self.n], noise_PM[:, 1 : 1 + self.n]",
        "anchor, noise_PM[:, 1:]",
        "forward over k, not over n",
    ),
    Mutation(_JBOND, "bestofn.quantiles", "where(at_most == 0", "where(at_most <= 1", "worse than one sample only"),
    Mutation(_JBOND, "bestofn.quantiles", "return -math.ldexp", "return math.ldexp", "two-level penalty"),
    *(Mutation(_BOND, "objectives.bond", *m) for m in _JEFFREYS),
    Mutation(_BOND, "objectives.bond", "(self.n - 1) * log_p", "-(self.n - 1) * log_p", "log-quantile"),
    Mutation(_BOND, "objectives.bond", "(self.n - 1) * log_p", "self.n * log_p", "n instead of n - 1"),
    Mutation(_BOND, "objectives.bond", "(self.n - 1) * log_p", "log_p", "r_BOND without its factor n - 1"),
    Mutation(_BOND, "objectives.bond", "signal + log_coll", "signal - log_coll", "collision term"),
    Mutation(_BOND, "objectives.bond", "ties(rewards_PM", "ties(-rewards_PM", "worst, not best"),
    Mutation(
        BOND(n=2, num_anchor_samples=4),
        "objectives.bond",
        "1 + argmax_random_ties(rewards_PM[:, 1 : 1 + self.n], noise_PM[:, 1 : 1 + self.n])",
        "1 + argmax_random_ties(rewards_PM[:, 1:], noise_PM[:, 1:])",
        "forward over all samples, not over n",
    ),
    Mutation(
        BOND(n=4, num_anchor_samples=2),
        "objectives.bond",
        "rewards_PM[:, 1 : 1 + self.num_anchor_samples]",
        "rewards_PM[:, 1:]",
        "quantile over all samples, not over k",
    ),
    Mutation(_BOND, "bestofn.quantiles", "1.0 - lower / at_most", "lower / at_most", "tied share"),
    Mutation(_BOND, "bestofn.quantiles", "values, right=True)", "values)", "ties do not count as reached"),
    Mutation(BestOfNSFT(n=3), "objectives.best_of_n_sft", "-logp_PL", "logp_PL", "loss"),
    Mutation(BestOfNSFT(n=3), "objectives.best_of_n_sft", "ties(rewards", "ties(-rewards", "worst, not best"),
    *(Mutation(Reinforce(beta_rl=0.7), "objectives.reinforce", *m) for m in _REWARD),
    Mutation(Reinforce(beta_rl=0.7), "objectives.reinforce", "logp_PL.detach()", "logp_PL", "log-ratio not detached"),
    *(Mutation(RLOO(beta_rl=0.7, num_samples=3), "objectives.rloo", *m) for m in _REWARD),
    Mutation(RLOO(beta_rl=0.7), "objectives.rloo", "logp_PL.detach()", "logp_PL", "log-ratio not detached"),
    *(Mutation(_GRPO, "objectives.grpo", *m) for m in _REWARD),
    *(
        Mutation(_GRPO, "objectives.grpo", *m)
        for m in [
            ("logp_PL.detach()", "logp_PL", "log-ratio not detached"),
            ("rewards_PM.std(dim=1,", "rewards_PM.std(dim=1, correction=0,", "std with m in its denominator"),
            ("rewards_PM.std(dim=1, keepdim=True)", "rewards_PM.std()", "std of the batch, not of the prompt"),
            ("+ STD_FLOOR", "", "no floor under the std"),
            ('== "group"', '== "none"', "std where none is asked for, and the reverse"),
            (" * (self.num_samples - 1) / self.num_samples", "", "signal without (m-1)/m"),
        ]
    ),
    *(
        Mutation(VBON(n=3, num_anchor_samples=3), "objectives.vbon", *m)
        for m in [
            ("- baseline_PC", "+ baseline_PC", "baseline"),
            ("return signal_PC", "return -signal_PC", "signal"),
            ("- (logp_PC - anchor_logp_PC)", "+ (logp_PC - anchor_logp_PC)", "log-ratio"),
            ("logp_PL.detach()", "logp_PL", "log-ratio not detached"),
            ("(self.n - 1) * torch", "-(self.n - 1) * torch", "log F"),
            ("(self.n - 1) * torch", "torch", "no factor n - 1"),
            ("strict=True", "strict=False", "ties counted as worse"),
            ("(worse + 1) /", "(worse + 2) /", "smoothing"),
            ("return leave_one_out_mean(", "return -leave_one_out_mean(", "baseline's mean"),
        ]
    ),
    *(
        Mutation(BoNBoN(n=3, alpha=0.005), "objectives.bonbon", *m)
        for m in [
            ("forward = -logp", "forward = logp", "fine-tuning part"),
            ("best - worst - self", "-best - worst - self", "best in the margin"),
            ("best - worst - self", "best + worst - self", "worst in the margin"),
            ("- self.margin", "+ self.margin", "margin"),
            ("(1 - self.alpha) *", "-(1 - self.alpha) *", "contrastive part"),
            ("self.alpha * forward", "-self.alpha * forward", "weight of the fine-tuning part"),
            ("(logp_PL - anchor_logp_PC)", "(logp_PL + anchor_logp_PC)", "anchor's log p"),
            ("range(1, self.n)", "range(1, self.n + 1)", "H_n instead of H_(n-1)"),
            ("ties(rewards_PM", "ties(-rewards_PM", "worst, not best"),
            ("1 - noise_PM", "noise_PM", "one sample as best and worst where all tie"),
        ]
    ),
    *(
        Mutation(BestOfNRegression(n=3, num_samples=3), "objectives.best_of_n_regression", *m)
        for m in [
            ("error = signal_PC", "error = -signal_PC", "target"),
            ("- (logp_PL - anchor", "+ (logp_PL - anchor", "log-ratio"),
            ("(logp_PL - anchor_logp_PC)", "(logp_PL + anchor_logp_PC)", "anchor's log p"),
            ("(error**2)", "-(error**2)", "loss"),
            (".mean(dim=1) / 2", ".mean(dim=1)", "factor 1/2"),
            ("(self.n - 1) * log_u", "-(self.n - 1) * log_u", "log-quantile"),
            ("+ log_coll", "- log_coll", "collision term (log n)"),
            ("rewards_PM, None, method", "rewards_PM, rewards_PM, method", "quantile that counts the sample itself"),
        ]
    ),
    *(
        Mutation(Listwise(n=3, num_samples=3), "objectives.listwise", *m)
        for m in [
            ("loss_P = -(", "loss_P = (", "loss"),
            ("logp_PL - anchor_logp_PC", "logp_PL + anchor_logp_PC", "anchor's log p"),
            (").log_softmax(", ").softmax(", "no logarithm"),
            ("- (worse / num_samples)", "+ (worse / num_samples)", "share of the worse ones"),
            ("(at_most + 1) /", "at_most /", "the sample itself not counted"),
            ("** self.n -", "** (self.n - 1) -", "order of Best-of-n"),
            ("at_most - worse + 1", "at_most * 0 + 1", "ties not seen"),
        ]
    ),
    *(
        Mutation(_SELF, "objectives.self_bond", *m)
        for m in [
            ("- baseline_PC", "+ baseline_PC", "baseline"),
            ("return signal_PC", "return -signal_PC", "signal"),
            ("- (logp_PC - anchor_logp_PC)", "+ (logp_PC - anchor_logp_PC)", "log-ratio"),
            ("(logp_PC - anchor_logp_PC)", "(logp_PC + anchor_logp_PC)", "reference's log p"),
            ("logp_PL.detach()", "logp_PL", "log-ratio not detached"),
            (" * others / self.num_samples", "", "signal without (K-1)/K"),
            ("[worse.long()", "[(others - at_most).long()", "better, not worse"),
            ("(at_most - worse).long()", "0 * worse.long()", "ties not seen"),
        ]
    ),
    *(
        Mutation(_SELF, "bestofn.own_quantiles", *m)
        for m in [
            ("signal_K[0] -= strength", "signal_K[-1] += strength", "bonus of the best, not penalty of the worst"),
            ("own ** (1.0 / n)", "own ** (1.0 / (n - 1 / 2))", "order of Best-of-n"),
            ("(1.0 - nodes) * density", "(1.0 - nodes**2) * density", "win rate that the strength is solved for"),
            ("= -np.log(num_samples * np", "= np.log(num_samples * np", "log of the reference share"),
            ("ratio + (excess", "ratio - (excess", "excess over Best-of-n"),
            (":-tied]) / tied", ":-tied])", "excess: sum over the orders of the tied, not mean"),
            ("np.log(tied / num_samples /", "np.log(1 / num_samples /", "own share of a tied level"),
        ]
    ),
    Mutation(
        SelfBOND(n=2, num_samples=4), "bestofn.own_quantiles", "better_than_K *", "better_than_K**2 *", "own quantile"
    ),
    Mutation(
        SelfBOND(n=2, num_samples=4),
        "bestofn.own_quantiles",
        "win_rate < n / (n + 1.0) else",
        "win_rate < n / (n + 2.0) else",
        "win rate of Best-of-n",
    ),
    Mutation(
        SelfBOND(n=2, num_samples=4, log_quantile="harmonic"),
        "bestofn.own_quantiles",
        "np.arange(1, num_samples))",
        "np.arange(2, num_samples + 1))",
        "harmonic numbers",
    ),
    *(
        Mutation(RLOO(beta_rl=0.7, num_samples=3), "objectives.terms", *m)
        for m in [
            ("(-logp_PL *", "(logp_PL *", "loss"),
            (" - returns_PC) /", ") /", "baseline with the sample itself"),
            ("(returns_PC.sum", "(-returns_PC.sum", "baseline's sum"),
            ("(returns_PC.shape[1] - 1)", "returns_PC.shape[1]", "baseline's count"),
            ("advantage_PL).mean(", "advantage_PL).sum(", "sum over samples, not mean"),
        ]
    ),
    Mutation(
        Reinforce(beta_rl=0.7),
        "objectives.terms",
        "values.sum() - values)",
        "values.sum() + 0 * values)",
        "baseline with the sample itself",
    ),
    Mutation(_BOND, "objectives.terms", "(values.numel() - 1)", "values.numel()", "baseline's count"),
]


def objective_module(objective: Any) -> str:
    return type(objective).__module__


def mutate(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The mutation's objective, with the same settings, from the changed source."""
    changed = f"bondlm.{mutation.module}"
    source = inspect.getsource(importlib.import_module(changed))
    assert mutation.old in source, f"{mutation.module} no longer says {mutation.old!r}: update the mutation"
    # `return signal_PC` and the like may stand twice (returns, metrics): the first is meant.
    mutated = _execute(changed, source.replace(mutation.old, mutation.new, 1))
    own = objective_module(mutation.objective)
    if own != changed:
        original, package = importlib.import_module(changed), importlib.import_module(changed.rpartition(".")[0])
        monkeypatch.setitem(sys.modules, changed, mutated)
        for name, value in vars(mutated).items():
            if not name.startswith("_") and getattr(package, name, None) is getattr(original, name, mutated):
                monkeypatch.setattr(package, name, value)
        mutated = _execute(own, inspect.getsource(importlib.import_module(own)))
    settings = {field.name: getattr(mutation.objective, field.name) for field in fields(mutation.objective)}
    return getattr(mutated, type(mutation.objective).__name__)(**settings)


def _execute(name: str, source: str) -> ModuleType:
    module = ModuleType(name)
    exec(compile(source, f"<mutant of {name}>", "exec"), vars(module))
    return module


def defects(objective: Any) -> list[str]:
    """What is wrong with an objective; empty for a right one."""
    found = []
    for logits, anchor, rewards in zip(LOGITS, ANCHOR, REWARDS, strict=True):
        exact = exact_gradient(objective, logits, anchor, rewards)
        error = (enumerated_gradient(objective, logits, anchor, rewards) - exact).abs().max()
        if not float(error) < 1e-9:
            found.append(f"mean gradient off by {float(error):.3g}")
    return found + _baseline_defects(objective)


def _baseline_defects(objective: Any) -> list[str]:
    """A baseline takes a constant out of the returns exactly, and never looks at the sample itself."""
    compare, found = objective.plan.compare, []
    if not float(objective.baseline(torch.ones(4, compare)).abs().sum()):
        return []  # an objective without a baseline
    returns = torch.linspace(-1, 2, 4 * compare, dtype=torch.float64).view(4, compare) ** 3
    if not torch.allclose(objective.baseline(returns + 5), objective.baseline(returns) + 5, rtol=1e-9, atol=1e-9):
        found.append("baseline does not follow a constant in the returns")
    for i, j in itertools.product(range(4), range(compare)):
        moved = returns.clone()
        moved[i, j] += 1
        if not torch.isclose(objective.baseline(moved)[i, j], objective.baseline(returns)[i, j]):
            found.append("baseline looks at the sample itself")
            break
    return found + _return_defects(objective) + _constant_defects(objective)


def _return_defects(objective: Any) -> list[str]:
    """The loss weighs samples by return - baseline, with the same return that the baseline is made of."""
    rows, compare = 4, objective.plan.compare
    logp = torch.linspace(-3, -1, rows * objective.plan.learn, dtype=torch.float64).view(rows, -1)
    anchor_logp, signal = logp[:, :compare].flip(0) - 0.5, logp[:, :compare] ** 2
    returns = objective.returns(signal, logp[:, :compare], anchor_logp)
    baseline = objective.baseline(returns)
    advantage = objective.loss(logp, anchor_logp, signal, baseline).metrics["bond/advantage"]
    same = torch.allclose(advantage, (returns - baseline).mean(1), rtol=1e-12)
    return [] if same else ["the loss's advantage is not return - baseline"]


def _constant_defects(objective: Any) -> list[str]:
    """A constant in every signal changes no gradient: it is in the returns, in their baseline, and cancels."""
    generator = torch.Generator().manual_seed(0)
    outcomes_PM, noise_PM = draw(objective.plan, LOGITS, ANCHOR, generator)
    gradients = []
    for constant in (0.0, 3.0):
        leaf = LOGITS.clone().requires_grad_()
        shifted = _Shifted(objective, constant)
        loss = loss_on(shifted, outcomes_PM, noise_PM, leaf, ANCHOR, REWARDS).loss_P.sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    same = torch.allclose(*gradients, rtol=1e-9, atol=1e-11)
    return [] if same else ["a constant in every signal changes the gradient"]


class _Shifted:
    """An objective whose signal is raised by a constant."""

    def __init__(self, objective: Any, constant: float) -> None:
        self.objective, self.constant = objective, constant

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def select(self, rewards_PM: Any, noise_PM: Any) -> Any:
        selection = self.objective.select(rewards_PM, noise_PM)
        return selection._replace(signal_PC=selection.signal_PC + self.constant)
