"""Learning a few prompts at a time is the same step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.helpers import TOKENIZER, capped
from models.test_logits_budget import VOCABULARY, scaled
from tiny import prompt_rows

from bondlm import BONDConfig, BONDTrainer


def learned(folder: Path, build: Callable[[], Any]) -> tuple[list[int], dict[str, torch.Tensor]]:
    """What one step of training makes of logits with a gradient, and the weights after it."""
    args = BONDConfig(
        **{"output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 8, "max_completion_length": 6},
        **{"warmup_steps": 0, "learning_rate": 1e-2, "optim": "sgd", "save_strategy": "no", "disable_tqdm": True},
        use_cpu=True,
    )
    model = build()

    def reward(completions: list[str]) -> list[float]:
        return [float(len(completion)) for completion in completions]

    trainer = BONDTrainer(model, reward, args, prompt_rows(8), processing_class=TOKENIZER)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.numel()) if out.requires_grad else None
    )
    trainer.train()
    return seen, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("build", [capped, scaled])
def test_a_model_that_alters_its_logits_learns_a_few_prompts_at_a_time(
    build: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts at a time and not eight: the same step."""
    whole, expected = learned(tmp_path / "whole", build)
    monkeypatch.setattr("bondlm.models.head.LOGITS_BUDGET", 4 * VOCABULARY * 2 * (2 * 6))
    parts, weights = learned(tmp_path / "parts", build)
    assert (len(whole), len(parts)) == (1, 4)
    assert max(parts) < max(whole)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-4)
