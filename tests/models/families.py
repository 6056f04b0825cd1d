"""A tiny model of every family that transformers can build: small sizes for the fields that its config has."""

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

NOISE_RATE = 0.1
VOCABULARY, CONTEXT, WINDOW, MOST_PARAMETERS = 96, 256, 8, 6_000_000
PAD, EOS = 2, [2, 5]
# By the names that configs use; a field that a config lacks is left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "src_vocab_size", "tgt_vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim", "dim"], 32),
    **dict.fromkeys(["word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "dff", "dim_ff", "d_inner", "ffn_hidden_size"], 64),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "feed_forward_size"], 64),
    **dict.fromkeys(["shared_intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["expert_ffn_hidden_size", "dense_intermediate_size", "shared_experts_intermediate_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "num_blocks"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_decoder_attention_heads", "linear_num_key_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["linear_num_heads", "index_n_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "d_head", "dim_head", "v_head_dim", "attention_head_size", "swa_head_dim"], 8),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"], 4),
    "qk_head_dim": 8,
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank", "time_step_rank", "laurel_rank"], 8),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"], CONTEXT),
    **dict.fromkeys(["max_encoder_position_embeddings", "max_decoder_position_embeddings"], CONTEXT),
    **dict.fromkeys(["max_target_positions", "context_length"], CONTEXT),
    **dict.fromkeys(["sliding_window", "attention_window_size", "window_size", "attention_chunk_size"], WINDOW),
    **dict.fromkeys(["local_attention", "sliding_window_size", "attention_window"], WINDOW),
    **dict.fromkeys(["rel_extent"], WINDOW),
    **dict.fromkeys(["index_topk", "keep_window_size"], 64),  # longer texts are refused
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups", "first_k_dense_replace"], 1),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 8),
    **dict.fromkeys(["pad_token_id", "bos_token_id"], PAD),
    **dict.fromkeys(["eos_token_id", "forced_eos_token_id"], PAD),
    **dict.fromkeys(["decoder_start_token_id", "start_token_id"], 3),
    "hidden_size_per_layer_input": 8,
    # vision and audio towers
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
}
# What the sizes above do not settle, by model type; applied to the config of the text.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MLA: dict[str, Any] = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "head_dim": 8}
INDEXED: dict[str, Any] = MLA | {"index_head_dim": 16, "index_n_heads": 4, "num_key_value_heads": 4}
LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
EXTRAS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["axk1", "deepseek_v2", "deepseek_v3", "minicpm3", "longcat_flash", "youtu", "glm4_moe_lite"],
        MLA | {"num_key_value_heads": 4},
    ),
    **dict.fromkeys(["axk2", "deepseek_v32", "glm_moe_dsa"], INDEXED),
    "bailing_hybrid": MLA | LINEAR | {"num_key_value_heads": 4},
    "kimi_linear": MLA | LINEAR | {"num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "diffllama": {"attention_dropout": 0.0},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "conv_kernel": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64, "shape_embed_dim": 8}
    | {"pronunciation_embed_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 4},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
    }
    | {"attention_head_dim": 16, "mamba_dt_rank": 4, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": None, "intermediate_size": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {kind: dict(ROPE) for kind in ("sliding_attention", "full_attention")},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}}
    | {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    **dict.fromkeys(["dots3_note_text"], MLA | {"num_key_value_heads": 4, "per_layer_config": None}),
    **dict.fromkeys(
        ["qwen4_exp_text"],
        {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8}
        | {"indexer_budget": 8, "indexer_compress_ratio": 2},
    ),
}
NEEDED = ("hidden_size_per_layer_input",)  # extras without which not even a config of the usual size can be made
OPTIONAL = ("sliding_window", "attention_chunk_size", "q_lora_rank")  # None is a value of its own
NAMES = {
    **dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    **dict.fromkeys(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
}


class CannotBuildError(Exception):
    """No small config of this family."""


def small_config(config_class: Any, extras: dict[str, Any]) -> Any:
    """A config of this class with small sizes, in its parts too (text, vision, audio).

    Layers of every kind that the family has, once each.
    """
    extras = dict(extras)
    default = config_class(**{k: v for k, v in extras.items() if k in NEEDED})
    values = default.to_dict()
    names = set(values) | set(default.attribute_map)
    chosen = {name: size for name, size in SIZES.items() if name in names}
    chosen = {name: size for name, size in chosen.items() if values.get(name, 0) is not None or name not in OPTIONAL}
    chosen |= {k: NOISE_RATE for k, v in values.items() if isinstance(v, float) and re.search(r"drop|jitter", k)}
    for alias, name in default.attribute_map.items():  # one of two names for the same field
        if alias in chosen and name in chosen:
            del chosen[alias]
    kinds = list(dict.fromkeys(values.get("layer_types") or []))
    if len(kinds) > 1:
        layers = default.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        chosen |= {"layer_types": kinds, layers: len(kinds)}
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None and not isinstance(part, dict):
            own = extras.pop(name, {})
            chosen[name] = small_config(type(part), EXTRAS.get(part.model_type, {}) | own)
    return config_class(**(chosen | extras))


def build(model_type: str, *, seed: int = 0, vocabulary: int = VOCABULARY) -> Any:
    """A tiny model with distributions that are far from uniform and depend on all that came before.

    Raises:
        CannotBuildError: for whatever reason.
    """
    try:
        return _built(model_type, seed, vocabulary)
    except Exception as error:
        raise CannotBuildError(str(error)) from error


def _built(model_type: str, seed: int, vocabulary: int) -> Any:
    extras = dict(EXTRAS.get(model_type, {}))
    config = small_config(CONFIG_MAPPING[model_type], extras)
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if getattr(part, name, None) == VOCABULARY:
                setattr(part, name, vocabulary)
    auto = NAMES[model_type]
    if auto is AutoModelForCausalLM and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 3
    if model_type == "encoder-decoder":
        config.decoder.is_decoder = config.decoder.add_cross_attention = True
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise CannotBuildError(f"{count} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        sharpen(model)
    return model.eval()


@torch.no_grad()
def sharpen(model: nn.Module) -> None:
    """Weights at the scale of a trained model: the initial ones would let wrong attention pass unseen."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "conv" not in name and float(parameter.std()) < 0.15:
            parameter.normal_(std=0.25)
