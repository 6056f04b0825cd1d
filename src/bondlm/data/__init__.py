"""What comes in: prompts, scored samples, chat templates, and the way from text to token ids and back.

No model and no device: a tokenizer is all that this package is given.
"""
