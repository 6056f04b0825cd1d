"""Tiny runs, and what a test asks of one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tiny import prompt_rows, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from torch import Tensor, nn
from transformers import TrainerCallback

from bondlm import BONDConfig, BONDTrainer
from bondlm.config import default_anchor

TOKENIZER = tiny_tokenizer()

MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_causal, "gpt2": tiny_gpt2, "t5": tiny_t5}


def low_ids(completion_ids: list[list[int]]) -> list[float]:
    """Mostly the share of tokens below 100, with few ties."""
    return [sum(t < 100 for t in ids) / len(ids) + 1e-3 * sum(ids) / 300 for ids in completion_ids]


def lora(kind: str = "llama", **settings: Any) -> LoraConfig:
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    arguments: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task}
    return LoraConfig(**arguments | settings)


def config(folder: Path, **settings: Any) -> BONDConfig:
    small: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-3,
        **({"eta": 0.2} if settings.get("anchor", default_anchor(settings.get("objective", "jbond"))) == "ema" else {}),
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "eval_num_samples": 2,
        "eval_num_reference_samples": 4,
    }
    return BONDConfig(output_dir=str(folder), **small | settings)


def ends_often(model: Any) -> Any:
    """A seventh of the tokens end a completion: completions of 1 to 5 tokens, finished and cut."""
    model.generation_config.eos_token_id = list(range(2, 300, 7))
    return model


def trainer(folder: Path, model: Any = None, *, reward: Any = low_ids, rows: int = 8, **settings: Any) -> BONDTrainer:
    """A trainer of a tiny model; keyword arguments of the constructor are taken out of `settings`."""
    names = "eval_dataset callbacks optimizers peft_config quantization_config processing_class train_dataset".split()
    arguments = {name: settings.pop(name) for name in names if name in settings}
    arguments = {"train_dataset": prompt_rows(rows), "processing_class": TOKENIZER} | arguments
    rows_given = arguments["train_dataset"]
    if isinstance(rows_given, list) and isinstance(rows_given[0], dict) and isinstance(rows_given[0]["prompt"], str):
        settings.setdefault("prompt_format", "plain")  # short prompts make short tests
    model = ends_often(tiny_causal(TOKENIZER)) if model is None else model
    return BONDTrainer(model, reward, config(folder, **settings), **arguments)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("time/", "step_time", "eval_runtime", "train_runtime", "train_samples_", "train_steps_")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


class Gradients(TrainerCallback):
    """Keeps the gradient of the first step, before it is clipped or used."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.first:
            self.first = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def optimizer_tensors(made: BONDTrainer) -> list[Tensor]:
    assert made.optimizer is not None
    state = made.optimizer.state_dict()["state"]
    return [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]


class Spoiled:
    """The engine, which leaves a NaN in the policy's head after it has sampled for one of the given steps."""

    def __init__(self, made: BONDTrainer, steps: set[int]) -> None:
        self._made, self._steps, self._generate = made, steps, made.engine.generate
        self._kept: Tensor | None = None
        made.engine.generate = self  # type: ignore[assignment]

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        head = self._made.roles.core.lm_head.weight
        if self._kept is not None:
            head[7] = self._kept
            self._kept = None
        drawn = self._generate(*args, **kwargs)
        if self._made.state.global_step + 1 in self._steps and kwargs["role"] == "anchor":  # the last call of a step
            self._kept = head[7].clone()
            head[7] = float("nan")
        return drawn
