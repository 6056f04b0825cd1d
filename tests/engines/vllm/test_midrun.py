"""A vLLM server in a run: its rounding stays out of the loss; if it fails the run saves and ends, to go on later."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.children import job, said, train
from peft import LoraConfig
from tiny import prompt_rows, tiny_causal

from bondlm import BONDTrainer
from bondlm.errors import ResourceError
from bondlm.models.adapters import wrap_adapter
from engines.vllm.helpers import TOKENIZER, length
from engines.vllm.helpers import config as config_of
from engines.vllm.helpers import trainer as stub_trainer
from engines.vllm.stub import Answer, Stub, serving

TWO_STEPS = 2 * 2 * 4  # requests for samples: two roles, four prompts
Fault = Callable[[str, Any], Answer | None]


@pytest.fixture
def stub() -> Iterator[Stub]:
    """Of the base model that `job` writes, with adapters of its shape."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    with serving(Stub(wrap_adapter(tiny_causal(TOKENIZER), lora), [2])) as made:
        yield made


def vllm_job(folder: Path, stub: Stub, **options: object) -> Path:
    settings: dict[str, object] = {"engine": "vllm", "vllm_base_url": stub.url, "dtype": "float32", "save_steps": 100}
    return job(folder, **settings | options)


def after_two_steps(stub: Stub, fault: Fault) -> Fault:
    def later(path: str, body: Any) -> Answer | None:
        is_third = len(stub.drawn()) >= TWO_STEPS + (path == "/v1/completions")  # this request is counted already
        return fault(path, body) if is_third else None

    return later


def error_500(path: str, body: Any) -> Answer | None:
    return (500, "EngineDeadError") if path == "/v1/completions" else None


def no_reload(path: str, body: Any) -> Answer | None:
    return (200, "ok") if path == "/v1/load_lora_adapter" else None


def forgotten(path: str, body: Any) -> Answer | None:
    """The server was started anew by hand, without adapters."""
    return 404, {"error": {"message": "no such route"}}


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [(error_500, 7, "HTTP 500"), (no_reload, 5, "reload"), (forgotten, 2, "no such route")],
    ids=["dead", "stale", "other"],
)
def test_a_fault_saves_and_ends_with_its_code_and_the_same_command_goes_on(
    stub: Stub, fault: Fault, code: int, message: str, tmp_path: Path
) -> None:
    config = vllm_job(tmp_path / "job", stub, learning_rate=1e-2)
    stub.fault = after_two_steps(stub, fault)
    assert train(config) == code, said(config)
    assert message in said(config)
    assert (tmp_path / "job" / "run" / "checkpoint-2" / "manifest.json").is_file()
    stub.fault = lambda path, body: None
    assert train(config) == 0, said(config)
    assert "training from step 2 to 3" in said(config)


def test_a_server_that_hangs_delays_no_exit(stub: Stub, tmp_path: Path) -> None:
    """One request fails at once; the others would be answered in a minute, and nobody waits for them."""
    seen: list[float] = []

    def fault(path: str, body: Any) -> Answer | None:
        if path != "/v1/completions" or "prompt_logprobs" in body:
            return None
        seen.append(time.monotonic())
        if len(seen) > 1:
            time.sleep(60)
        return 400, {"error": {"message": "no more"}}

    config = vllm_job(tmp_path / "job", stub, vllm_timeout=120.0)
    stub.fault = after_two_steps(stub, fault)
    command = [sys.executable, "-m", "bondlm", "train", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 2, ended.stderr
    assert "no more" in ended.stderr
    assert (tmp_path / "job" / "run" / "checkpoint-2" / "manifest.json").is_file()
    assert time.monotonic() - seen[0] < 20


def test_a_fault_in_an_evaluation_saves_too(stub: Stub, tmp_path: Path) -> None:
    """Reference samples are drawn by evaluations alone."""
    rows, settings = prompt_rows(6), {"save_strategy": "steps", "save_steps": 100, "max_steps": 4}
    args = config_of(tmp_path, vllm_base_url=stub.url, eval_strategy="steps", eval_steps=2, **settings)
    made = BONDTrainer(
        *(tiny_causal(TOKENIZER), length, args, rows[:4], rows[4:]),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    stub.fault = lambda path, body: (
        (500, "dead")
        if path == "/v1/completions" and body["model"].endswith("-reference") and "prompt_logprobs" not in body
        else None
    )
    with pytest.raises(ResourceError, match="dead"):
        made.train()
    assert made.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "manifest.json").is_file()
    with pytest.raises(ResourceError):  # outside training an evaluation has nothing to save
        made.evaluate()


def weights_after(folder: Path, stub: Stub) -> dict[str, torch.Tensor]:
    made = stub_trainer(folder, stub)
    made.train()
    return {name: p.detach() for name, p in made.roles.model.named_parameters() if p.requires_grad}


def test_log_probabilities_of_a_server_that_rounds_do_not_enter_the_loss(tmp_path: Path) -> None:
    """The same tokens with other numbers, as from a server in bf16: the same weights after three steps."""

    def rounded(answer: dict[str, Any]) -> None:
        for choice in answer["choices"]:
            if "logprobs" in choice:
                choice["logprobs"]["token_logprobs"] = [x - 0.05 for x in choice["logprobs"]["token_logprobs"]]

    base = wrap_adapter(tiny_causal(TOKENIZER), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with serving(Stub(base, [2])) as plain, serving(Stub(base, [2])) as rounding:
        rounding.spoil = rounded
        expected, weights = weights_after(tmp_path / "plain", plain), weights_after(tmp_path / "rounding", rounding)
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
