"""Samples with their rewards: drawn, scored, and treated where they were cut. What training and evaluation start from.

No objective and no gradient.
"""
