"""The run folder: its files, checkpoints, manifests and lock.

No model and no data set: `bondlm report` needs nothing else, and no torch.
"""
