"""What `sample`, `score` and `eval` draw from is the model that was trained, its adapter included."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import PROMPTS, tiny_causal, tiny_tokenizer
from transformers import AutoModelForCausalLM

from bondlm.rollout.sampler import Sampler

TOKENIZER = tiny_tokenizer()
IDS = torch.tensor([TOKENIZER.encode(prompt)[:8] for prompt in PROMPTS])
KINDS: dict[str, Any] = {
    "lora": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def folder_of(kind: str, folder: Path) -> Path:
    tiny_causal(TOKENIZER).save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), deepcopy(KINDS[kind]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "run")
    TOKENIZER.save_pretrained(folder / "run")
    return folder / "run"


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float().log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_adapter_is_computed_as_it_was_trained(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run = folder_of(kind, tmp_path)
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype), str(run))
    sampler = Sampler(str(run), dtype=str(dtype).removeprefix("torch."))
    torch.testing.assert_close(
        logprobs(sampler.model), logprobs(trained), atol=0 if dtype == torch.bfloat16 else 1e-4, rtol=0
    )
    is_merged = not any(isinstance(module, BaseTunerLayer) for module in sampler.model.modules())
    assert is_merged == (kind == "lora" and dtype == torch.float32)
    rows = sampler.rows([{"prompt": prompt} for prompt in PROMPTS[:2]], max_completion_length=3)
    assert [len(row) for row in sampler.sample(rows, 2, max_completion_length=3)] == [2, 2]
