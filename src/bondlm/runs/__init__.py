"""The run folder: its files, checkpoints, manifests and lock.

It has no models or data sets and needs no torch; `bondlm report` uses nothing else.
"""
