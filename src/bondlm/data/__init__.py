"""The inputs of a run: prompts, scored samples, chat templates, and conversion between text and token ids.

This package needs no model and no device, only a tokenizer.
"""
