"""The parts of a training step and what happens around it: micro-batches, callbacks, processes, metrics.

The order of the parts is in `bondlm.training.step`; `bondlm.trainer` hangs it into `transformers.Trainer`.
"""
