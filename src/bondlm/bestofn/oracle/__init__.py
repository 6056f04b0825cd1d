"""Exact expectations, gradients and fixed points on a finite outcome space, for the tests of every objective.

Pure float64 functions of tables. Nothing here samples, and no trainer imports it.
"""
