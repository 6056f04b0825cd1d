"""Tiny reward models: a word-level BERT tokenizer, BERT and Llama classifiers with scores that are far apart."""

from typing import Any

import torch
from tiny import PROMPTS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ConvBertConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    XLNetConfig,
)

COMPLETIONS = [
    "blue",
    "they rest a lot because they hunt at night and need it",
    "rain rain",
    "five",
    "the dog is called bob",
    "put it in boiling water for eight minutes then cool it down and peel it",
    "night",
    "in the sea",
]
ROWS = list(zip(PROMPTS, COMPLETIONS, strict=False))


def bert_tokenizer(max_length: int = 64) -> PreTrainedTokenizerFast:
    """[CLS] text [SEP], and [CLS] first [SEP] second [SEP] with token types; no end-of-sequence token."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    backend.train_from_iterator([*PROMPTS, *COMPLETIONS, "summarize"], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def bert_config(tokenizer: Any, **settings: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
        **settings,
    )


def _built(model_class: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).double()  # so that another batch shape rounds far below what tests allow


def bert_classifier(tokenizer: Any, **settings: Any) -> BertForSequenceClassification:
    return _built(
        BertForSequenceClassification,
        bert_config(tokenizer, **(({} if "label2id" in settings else {"num_labels": 1}) | settings)),
    )


def bert_encoder(tokenizer: Any) -> BertModel:
    return _built(BertModel, bert_config(tokenizer))


def unmasked_config(family: str, tokenizer: Any, **settings: Any) -> Any:
    """A ConvBERT, whose convolutions reach padding, or an XLNet, whose head reads the last position."""
    settings = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.5,
    } | settings
    if family == "xlnet":
        return XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=32, **settings)
    sizes = {"hidden_size": 16, "embedding_size": 16, "intermediate_size": 32}
    return ConvBertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes, **settings)


def unmasked(auto_class: Any, *configured: Any, **settings: Any) -> Any:
    return _built(auto_class.from_config, unmasked_config(*configured, **settings))


def llama_classifier(tokenizer: Any, *, pad_token_id: int | None = None, labels: int = 1) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.5,
        num_labels=labels,
        pad_token_id=pad_token_id,
    )
    return _built(LlamaForSequenceClassification, config)


def saved(folder: Any, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
