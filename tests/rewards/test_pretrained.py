"""The head of a reward model, whatever its family calls it."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from bondlm.rewards.pretrained import with_fp32_head

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim", "d_inner"), 32),
    **{"d_kv": 8, "d_head": 8, "head_dim": 8, "num_decoder_layers": 1, "vocab_size": 60, "num_labels": 3},
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0},
}
FAMILIES = (
    "albert bart bert big_bird bloom camembert ctrl deberta deberta-v2 distilbert electra flaubert gemma gpt2 gpt_neox "
    "llama mbart mistral modernbert mpnet mpt mt5 mvp openai-gpt opt phi3 plbart qwen2 qwen3 rembert roberta t5 umt5 "
    "xlm xlm-roberta xlnet"
).split()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_computes_in_fp32(family: str) -> None:
    sizes = {k: v for k, v in SIZES.items() if not (family == "xlnet" and k == "num_hidden_layers")}
    model: Any = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **sizes))
    model = with_fp32_head(model.to(torch.bfloat16).eval())
    logits = model(input_ids=torch.tensor([[5, 6, 7, 1]])).logits
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).any()
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert sum(p.dtype == torch.float32 for p in model.parameters()) <= 2  # weight and bias of one layer
