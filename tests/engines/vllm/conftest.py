"""A stub of vLLM with a tiny model and two adapters, and the engine that is its client."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_causal

from bondlm.engines.choose import server_options, whole_model_options
from bondlm.engines.vllm.lora import VLLMEngine
from bondlm.engines.vllm.server import LocalServer
from bondlm.models.adapters import wrap_adapter
from bondlm.models.roles import Roles
from engines.vllm.helpers import EOS, LORA_DTYPE, ON_GPU, PYTHON, TOKENIZER, change, config, connect
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


# -- real servers, for `make test-vllm`


def share_of_card() -> list[str]:
    """What each of the servers takes of a GPU."""
    return ["--gpu-memory-utilization=0.1"] if ON_GPU else []


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    model = tiny_causal(TOKENIZER, hidden=128)  # vLLM's attention on CPU wants heads of 32
    model.config.max_position_embeddings = 4096  # a judge's question is long in these tokens
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def server(base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("server")
    options = server_options(LORA_DTYPE, 8, config(folder)) + share_of_card()
    made = LocalServer(PYTHON, base, options, log=folder / "server.log", start_timeout=400, on_cpu=not ON_GPU)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose head is its embedding: vLLM on a CPU does not reload such a head, unless it is given it too."""
    folder = tmp_path_factory.mktemp("tied")
    model = tiny_causal(TOKENIZER, hidden=128)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def whole_server(tied: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("whole_server")
    options = whole_model_options(Roles(tiny_causal(TOKENIZER, hidden=128)), config(folder)) + share_of_card()
    made = LocalServer(PYTHON, tied, options, log=folder / "server.log", start_timeout=400, on_cpu=not ON_GPU)
    yield made
    made.stop()
