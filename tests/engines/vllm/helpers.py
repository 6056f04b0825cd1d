"""What the tests of vLLM's clients share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tiny import PROMPTS, prompt_rows, tiny_causal, tiny_tokenizer

from bondlm import BONDConfig, BONDTrainer
from bondlm.engines.vllm.http import VLLMClient
from bondlm.engines.vllm.lora import VLLMEngine
from bondlm.models.roles import Roles
from bondlm.training.processes import World
from engines.vllm.stub import Answer, Stub, first

# Absolute, since tests change their folder; not resolved: a virtual environment's interpreter is a link.
PYTHON = os.path.abspath(named) if (named := os.environ.get("BONDLM_VLLM_PYTHON", "")) else ""
ON_GPU = os.environ.get("BONDLM_VLLM_ON") == "cuda"  # where the servers compute; benchmarks/on_gpu.sh
LORA_DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # of a real server: vLLM's LoRA kernels know no fp32
ALONE = World(size=1, rank=0, device=torch.device("cpu"))
TOKENIZER = tiny_tokenizer()
EOS = list(range(0, 300, 9))
IDS = [TOKENIZER.encode(prompt) for prompt in PROMPTS[:4]]
SEEDS = [11, 12, 13, 14]
PROBE = TOKENIZER.encode("a text that server and trainer are compared by")


def change(roles: Roles, size: float) -> None:
    """Move the policy's adapter as a step of an optimizer would."""
    with torch.no_grad():
        for parameter in roles.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)


def connect(stub: Stub, roles: Roles, folder: Path, timeout: float = 20.0) -> VLLMEngine:
    client = VLLMClient(stub.url, timeout=timeout, max_wait=0.02)
    return VLLMEngine(
        *([client], roles.model, roles.adapter_roles, roles.use),
        processes=ALONE,
        eos_ids=EOS,
        probe_ids=PROBE,
        folder=folder,
    )


def draw_both(engine: VLLMEngine) -> Any:
    return engine.generate_roles(IDS, {"policy": (2, SEEDS), "anchor": (3, SEEDS)}, max_new_tokens=6)


def ignore_reloads(times: int) -> Callable[[str, Any], Answer | None]:
    return first(times, (200, "ok"), "/v1/load_lora_adapter")


def config(folder: Path, **changes: Any) -> BONDConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "max_completion_length": 5,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "engine": "vllm",
        "dtype": "float32",
    }
    return BONDConfig(**settings | changes)


def length(completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


def trainer(folder: Path, stub: Stub, **changes: Any) -> BONDTrainer:
    torch.manual_seed(0)
    return BONDTrainer(
        *(tiny_causal(TOKENIZER), length, config(folder, vllm_base_url=stub.url, **changes), prompt_rows(6)),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
