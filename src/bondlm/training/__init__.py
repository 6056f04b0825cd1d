"""The parts of a training step and what happens around it: micro-batches, callbacks, processes, metrics.

`bondlm.training.step` has the order of the parts; `bondlm.trainer` connects it to `transformers.Trainer`.
"""
