"""A step of training with models that are not plain transformers: sampler and learner agree, weights move and load."""

from pathlib import Path

import pytest
import torch
from models.families import build
from peft import LoraConfig
from tiny import prompt_rows, tiny_tokenizer

from bondlm import BONDConfig, BONDTrainer
from bondlm.engines.agreement import GAP_METRIC
from bondlm.errors import ConfigError
from bondlm.models.load import load_model

TOKENIZER = tiny_tokenizer()


def length_reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    return [float(len(completion)) for completion in completions]


def trainer_of(family: str, folder: Path, *, lora: bool = False) -> BONDTrainer:
    args = BONDConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=3,
        max_completion_length=6,
        learning_rate=1e-3,
        warmup_steps=0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
    )
    peft_config = LoraConfig(r=2, target_modules="all-linear") if lora else None
    model = build(family, vocabulary=len(TOKENIZER))
    return BONDTrainer(model, length_reward, args, prompt_rows(6), processing_class=TOKENIZER, peft_config=peft_config)


KINDS = [("qwen3_next", False), ("lfm2", True), ("mamba", False), ("gemma3", True), ("gemma4_text", False)]


@pytest.mark.parametrize(("family", "lora"), [*KINDS, ("bart", False)])
def test_sampler_and_learner_agree(family: str, lora: bool, tmp_path: Path) -> None:
    trainer = trainer_of(family, tmp_path, lora=lora)
    trainer.train()
    gaps = [row[GAP_METRIC] for row in trainer.state.log_history if GAP_METRIC in row]
    assert len(gaps) == 2
    assert max(gaps) < 1e-4
    if not lora:
        trainer.save_model()
        loaded = load_model(tmp_path, dtype=torch.float32)
        assert type(loaded) is type(trainer.roles.core)


def test_what_cannot_be_computed_in_batches_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="RobertaForCausalLM"):
        trainer_of("roberta", tmp_path)
