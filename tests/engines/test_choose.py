"""What a run says of its engine."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bondlm.engines.choose import engine_choice


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "auto", "device": torch.device("cpu")}, "16 times slower on a CPU"),
        ({"engine": "auto", "device": torch.device("cuda")}, "compared on CPUs alone .*, not on cuda"),
        ({"engine": "transformers", "device": torch.device("cpu")}, "engine: transformers$"),
        ({"engine": "vllm", "vllm_server": "auto"}, "engine: vllm, a server of this run$"),
        ({"engine": "vllm", "vllm_server": "external"}, "engine: vllm, the server at vllm_base_url$"),
    ],
)
def test_the_choice_is_said_with_its_reason_for_this_device(settings: dict[str, Any], said: str) -> None:
    args: Any = SimpleNamespace(**settings)
    assert re.search(said, engine_choice(args))
