"""Exact expectations, gradients and fixed points on a finite outcome space: what every objective is tested against.

Pure float64 functions of tables. Nothing here samples, and no trainer imports it.
"""
