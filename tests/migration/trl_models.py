"""Data and models in the place of those on the hub that TRL's tests ask for: tiny, random, made here."""

from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, DatasetDict
from tiny import tiny_tokenizer

LINES = [f"{first} is better than {last}" for first in ("Simple", "Flat", "Sparse", "Now") for last in "abcde"]
THINKING = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 4}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 4, "ssm_state_size": 8, "n_groups": 1, "head_dim": 4}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM-2.5": {},
    "Qwen3ForCausalLM": {"head_dim": 4},
    "Cohere2ForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 4},
    "GptOssForCausalLM": {"head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": EXPERTS | {"num_experts": 4},
    "Glm4MoeForCausalLM": EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "NemotronHForCausalLM-nano": MAMBA | {"layers_block_type": ["mamba", "attention"]},
    "Qwen2ForSequenceClassification-2.5": {"num_labels": 1},
    "Qwen3ForSequenceClassification": {"num_labels": 1},
}


def load_dataset(name: str, config: str, split: str | None = None, *, streaming: bool = False) -> Any:
    """In the place of TRL's `zen`: 17 prompts to train on, 2 held out."""
    is_chat = config.startswith("conversational")
    rows = [{"prompt": [{"role": "user", "content": line}] if is_chat else line} for line in LINES]
    parts = DatasetDict(train=Dataset.from_list(rows[:17]), test=Dataset.from_list(rows[17:19]))
    whole = {name: part.to_iterable_dataset() for name, part in parts.items()} if streaming else parts
    return whole if split is None else whole[split]


def save_models(folder: Path) -> None:
    """Tiny models with random weights, by the names that TRL's tests have for theirs."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"{tokenizer.chat_template}{THINKING}"
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "vocab_size": 300}
    for name, more in MODELS.items():
        transformers.set_seed(0)
        model_class = getattr(transformers, name.partition("-")[0])
        model_class(model_class.config_class(**SIZES | ids | more)).save_pretrained(folder / f"tiny-{name}")
        tokenizer.save_pretrained(folder / f"tiny-{name}")
