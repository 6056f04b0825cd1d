"""Evaluation of a trained policy: numbers with intervals, honest baselines, samples side by side."""

from bondlm.evaluation.run import evaluate_run

__all__ = ["evaluate_run"]
