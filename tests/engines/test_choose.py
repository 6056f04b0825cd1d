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
        ({"engine": "auto", "device": torch.device("cpu")}, "16 times slower on CPUs"),
        ({"engine": "auto", "device": torch.device("cuda")}, "9 to 11 times slower on an H200"),
        ({"engine": "auto", "device": torch.device("mps")}, "compared on CPUs and CUDA alone, not on mps"),
        ({"engine": "transformers", "device": torch.device("cpu")}, "engine: transformers$"),
        ({"engine": "vllm", "vllm_server": "auto"}, "engine: vllm, a server of this run$"),
        ({"engine": "vllm", "vllm_server": "external"}, "engine: vllm, the server at vllm_base_url$"),
    ],
)
def test_the_choice_is_said_with_its_reason_for_this_device(settings: dict[str, Any], said: str) -> None:
    args: Any = SimpleNamespace(**settings)
    assert re.search(said, engine_choice(args))
