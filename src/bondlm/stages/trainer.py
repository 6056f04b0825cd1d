"""Saving, shared by the trainers of both stages before BOND."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from bondlm.errors import NonFiniteError


class StageTrainer(Trainer):
    """`transformers.Trainer` that refuses to save non-finite weights, and saves no pickle of its settings."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a checkpoint or the trained model.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        model: Any = self.model
        weights = state_dict or dict(model.named_parameters())
        wrong = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
        if wrong:
            raise NonFiniteError(
                f"step {self.state.global_step}: {len(wrong)} of {len(weights)} weights are not finite, {wrong[0]} is "
                "the first, and they are not saved: lower learning_rate"
            )
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            (folder / "training_args.bin").unlink(missing_ok=True)  # an unused pickle that contains access tokens
