"""The stages before BOND: supervised fine-tuning, and a reward model from preferences."""
