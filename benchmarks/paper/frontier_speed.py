"""Lets several runs share a GPU and a few cores: fewer, larger kernels, and prompts encoded once."""

from functools import partial
from pathlib import Path
from typing import Any

from frontier_signals import write


def few_launches() -> None:
    """Use fewer, larger kernels: the bottleneck of a GPU that several runs share. Results are equal up to rounding."""
    from weakref import WeakKeyDictionary

    import t5_decoding
    import torch

    from bondlm.models import head, logprobs
    from bondlm.training import step

    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and all batches differ here
    t5_decoding.install()
    head.LOGITS_BUDGET = 2**30
    step.group_logprobs = partial(logprobs.group_logprobs, batch_rows=1024)
    known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
    asked = logprobs.exact_head

    def exact_head(model: Any, device: Any) -> Any:
        if model not in known:  # costs a forward pass
            known[model] = asked(model, device)
        return known[model]

    logprobs.exact_head = exact_head


def encode_once(args: Any) -> None:
    """Read and encode the prompts once for all runs of this process; on a GPU that takes half a run's learning time."""
    from transformers import AutoConfig, AutoTokenizer

    from bondlm.data.prompt_encoder import PromptEncoder
    from bondlm.training import dropped

    base = args.models / "flan-t5-small-title"
    config, encode, load = AutoConfig.from_pretrained(base), PromptEncoder.encoded, dropped.load_prompts
    known: dict[Any, Any] = {}

    def encoded(self: Any, source: Any, skipped: Any = None, *, held_out: bool = False) -> Any:
        key = len(source), source[0]["prompt"]
        if key not in known:
            known[key] = encode(self, source, skipped, held_out=held_out)
        return known[key]

    def load_prompts(source: Any, **how: Any) -> Any:
        if source not in known:
            known[source] = load(source, **how)
        return known[source]

    PromptEncoder.encoded, dropped.load_prompts = encoded, load_prompts
    ids = {"eos_ids": [config.eos_token_id], "pad_id": config.pad_token_id, "start_id": config.decoder_start_token_id}
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = PromptEncoder(tokenizer=tokenizer, config=config, **ids, max_completion_length=args.length)
    encoder.encoded(load_prompts(str(all_prompts(args))))


def all_prompts(args: Any) -> Path:
    """The prompts of both training splits, in one file."""
    path = args.data / "prompts.jsonl"
    if not path.exists():
        parts = [(args.data / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "sft")]
        write(path, "".join(parts))
    return path
