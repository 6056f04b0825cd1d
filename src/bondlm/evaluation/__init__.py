"""Evaluation of a trained policy: numbers with intervals, fair baselines, and samples to compare."""

from bondlm.evaluation.run import evaluate_run

__all__ = ["evaluate_run"]
