"""Objectives: pure losses, scores and log-probabilities in, loss and metrics out. One file each, no registry."""

from bondlm.objectives.base import LearnedQuantile, Loss, Objective, SamplePlan, Selection
from bondlm.objectives.best_of_n_regression import BestOfNRegression
from bondlm.objectives.best_of_n_sft import BestOfNSFT
from bondlm.objectives.bonbon import BoNBoN
from bondlm.objectives.bond import BOND
from bondlm.objectives.grpo import GRPO
from bondlm.objectives.jbond import JBOND
from bondlm.objectives.listwise import Listwise
from bondlm.objectives.reference_kl import reference_pull, with_reference_kl
from bondlm.objectives.reinforce import Reinforce
from bondlm.objectives.rloo import RLOO
from bondlm.objectives.self_bond import SelfBOND
from bondlm.objectives.vbon import VBON

__all__ = [
    "BOND",
    "GRPO",
    "JBOND",
    "RLOO",
    "VBON",
    "BestOfNRegression",
    "BestOfNSFT",
    "BoNBoN",
    "LearnedQuantile",
    "Listwise",
    "Loss",
    "Objective",
    "Reinforce",
    "SamplePlan",
    "Selection",
    "SelfBOND",
    "reference_pull",
    "with_reference_kl",
]
