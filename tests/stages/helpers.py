import json
from pathlib import Path
from typing import Any

from tiny import prompt_rows, tiny_causal, tiny_t5, tiny_tokenizer

CHEAP = ["--use_cpu", "true", "--warmup_steps", "0", "--per_device_train_batch_size", "4", "--logging_steps", "5"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save(folder: Path, kind: str) -> str:
    tokenizer = tiny_tokenizer(chat=kind == "causal")
    (tiny_causal(tokenizer) if kind == "causal" else tiny_t5(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def preferences(n: int, *, chat: bool = False) -> list[dict[str, Any]]:
    """The answer with `blue` is always preferred."""
    return [row | {"chosen": "blue", "rejected": "red"} for row in prompt_rows(n, chat=chat)]
