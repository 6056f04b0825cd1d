"""Tiny tokenizers, models and prompts, built in memory in well under a second: no network, no files.

Import as `from tiny import tiny_tokenizer, tiny_causal`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, START, END, BOS = "<pad>", "<|im_start|>", "<|im_end|>", "<s>"
CONTEXT = 256
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPTS = [
    "Name a colour of the sky.",
    "Why do cats sleep so much?",
    "Write one line about rain.",
    "What is two plus three?",
    "Give the dog a short name.",
    "How do I boil an egg?",
    "Say good night in one word.",
    "Where does the river end?",
    "List three kinds of fruit.",
    "Tell me about the moon.",
    "What makes bread rise?",
    "Finish: once upon a time",
]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def prompt_rows(n: int, *, chat: bool = False) -> list[dict[str, Any]]:
    """`n` different prompt-only rows."""
    texts = [PROMPTS[i % 12] + (f" ({i // 12})" if i >= 12 else "") for i in range(n)]
    return [{"prompt": [{"role": "user", "content": text}] if chat else text} for text in texts]


@cache
def _backend_json() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*PROMPTS, "system user assistant tool"], trainer)
    return backend.to_str()


def tiny_tokenizer(
    *,
    chat: bool = True,
    pad: Literal["own", "eos"] | None = "own",
    eos: bool = True,
    adds_bos: bool = False,
    adds_eos: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens: `<pad>` 0, `<|im_start|>` 1, `<|im_end|>` 2 (EOS); any text round-trips.

    `<pad>` and `<|im_end|>` stay special tokens when `pad` or `eos` says that they are not in use. `adds_bos` makes a
    301st token `<s>` and puts it before every text, `adds_eos` puts EOS behind every text.
    """
    backend = Tokenizer.from_str(_backend_json())
    if adds_bos:
        backend.add_special_tokens([AddedToken(BOS, special=True, normalized=False)])
    if adds_bos or adds_eos:
        ids = {BOS: 300} if adds_bos else {}
        ids |= {END: 2} if adds_eos else {}
        single = [*([BOS] if adds_bos else []), "$A", *([END] if adds_eos else [])]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(single), pair=None, special_tokens=list(ids.items())
        )
    special = {"bos_token": BOS} if adds_bos else {}
    if eos:
        special["eos_token"] = END
    if pad is not None:
        special["pad_token"] = PAD if pad == "own" else END
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = CHATML if chat else None
    return tokenizer


def _ready(model: Any, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> None:
    """Set the special ids, and leave the model as `from_pretrained` does: in eval mode."""
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, pad_id
        config.bos_token_id = tokenizer.bos_token_id
    model.to(dtype).eval()


def tiny_causal(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """Llama with grouped-query attention (4 heads, 2 for keys and values) and far from uniform distributions."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    _ready(model, tokenizer, dtype)
    return model


def tiny_gpt2(
    tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, dropout: float = 0.1, dtype: torch.dtype = torch.float32
) -> GPT2LMHeadModel:
    """GPT-2 with dropout, to show whether code runs in train or in eval mode."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    _ready(model, tokenizer, dtype)
    return model


def tiny_t5(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    dropout: float = 0.1,
    dtype: torch.dtype = torch.float32,
    decoder_layers: int = 2,
) -> T5ForConditionalGeneration:
    """T5 (encoder-decoder, dropout); the decoder starts with the padding id, the encoder has two layers."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=decoder_layers,
        num_heads=4,
        dropout_rate=dropout,
        initializer_factor=1.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
    _ready(model, tokenizer, dtype)
    # T5 starts its decoder with the padding id, whichever that is.
    model.config.decoder_start_token_id = model.config.pad_token_id
    model.generation_config.decoder_start_token_id = model.config.pad_token_id
    return model
