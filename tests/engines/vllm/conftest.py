"""A stub of vLLM with a tiny model and two adapters, and the engine that is its client."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_causal

from bondlm.engines.vllm.lora import VLLMEngine
from bondlm.models.adapters import wrap_adapter
from bondlm.models.roles import Roles
from engines.vllm.helpers import EOS, TOKENIZER, change, connect
from engines.vllm.stub import Stub, serving


@pytest.fixture
def roles() -> Roles:
    torch.manual_seed(0)
    made = Roles(wrap_adapter(tiny_causal(TOKENIZER), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    change(made, 0.1)  # policy and anchor differ
    return made


@pytest.fixture
def stub(roles: Roles) -> Iterator[Stub]:
    with serving(Stub(roles.model, EOS)) as made:
        yield made


@pytest.fixture
def engine(stub: Stub, roles: Roles, tmp_path: Path) -> VLLMEngine:
    return connect(stub, roles, tmp_path)


@pytest.fixture
def plain_stub() -> Iterator[Stub]:
    """Of the trainer's base model, ending where its tokenizer says."""
    with serving(
        Stub(wrap_adapter(tiny_causal(TOKENIZER), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), [2])
    ) as s:
        yield s
