"""Samples with their rewards, for training and evaluation: drawn, scored, and treated if they were truncated.

No objective and no gradient.
"""
