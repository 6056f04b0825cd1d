"""Two training processes over vLLM, against stub servers: who draws what, and a fault of one is a fault of both."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.launch import ROOT
from faults.children import job, said, train
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import tiny_causal

from bondlm.engines.vllm.handover import SHARED
from bondlm.models.adapters import wrap_adapter
from engines.vllm.helpers import TOKENIZER
from engines.vllm.ranks import train_as, train_as_two
from engines.vllm.stub import Answer, Stub, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
LORA_NAMES = ("use_peft:", "lora_r:")
PLAIN = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}  # AdamW makes much of rounding
Start = Callable[..., Stub]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server of the base model that `job` writes."""
    with ExitStack() as running:
        yield lambda *, lora=True, seed=0: running.enter_context(
            serving(Stub(wrap_adapter(tiny_causal(TOKENIZER, seed=seed), LORA) if lora else _base(seed), [2]))
        )


def _base(seed: int) -> Any:
    return tiny_causal(TOKENIZER, seed=seed)


def settings(*stubs: Stub, **more: object) -> dict[str, Any]:
    urls = [stub.url for stub in stubs]
    own = {"engine": "vllm", "vllm_base_url": urls if len(urls) > 1 else urls[0], "dtype": "float32"}
    return own | {"learning_rate": 1e-2, "save_steps": 100, "ddp_timeout": 60} | more


def asked(*stubs: Stub) -> Counter[str]:
    """What samples were asked for, by everything that they depend on."""
    fields = ("prompt", "n", "seed", "max_tokens", "temperature")
    drawn = [body for stub in stubs for body in stub.drawn()]
    roles = [body["model"].rpartition("-")[2] for body in drawn]  # the rest of an adapter's name is the run's
    return Counter(str([role, *(body[name] for name in fields)]) for role, body in zip(roles, drawn, strict=True))


def weights(config: Path, file: str) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_file(config.parent / "run" / file).values()])


def same_result(one: Path, two: Path, *files: str) -> None:
    """Residuals far below what was learned: the distance between the two files, the policy and its anchor."""
    policy, anchor = (weights(one, file) for file in files)
    for file in files:
        gap = (weights(two, file) - weights(one, file)).abs()
        assert float(gap.max()) < 2e-6, file
        assert float(gap.mean()) < 1e-4 * float((policy - anchor).abs().mean()), file


def test_two_processes_draw_what_one_draws(start: Start, tmp_path: Path) -> None:
    """The same prompts from the same seeds, once each, in steps and in the last evaluation; the same weights."""
    more = {"eval_dataset": str(tmp_path / "one" / "heldout.jsonl"), "eval_num_reference_samples": 2, **PLAIN}
    alone = start()
    one = job(tmp_path / "one", **settings(alone, per_device_train_batch_size=4, **more))
    assert train(one) == 0, said(one)
    for servers in (1, 2):
        several = [start() for _ in range(servers)]
        two = job(tmp_path / f"two-{servers}", **settings(*several, per_device_train_batch_size=2, **more))
        assert train_as_two(two) == [0, 0], said(two)
        assert asked(*several) == asked(alone)
        assert all(len(stub.drawn()) == len(alone.drawn()) / servers for stub in several)
        loaded = [len(stub.bodies("/v1/load_lora_adapter")) for stub in (alone, *several)]
        assert len(set(loaded)) == 1  # each server as often as a single one, not once for each process
        same_result(one, two, "adapter_model.safetensors", "checkpoint-2/anchor.safetensors")


def full(config: Path) -> Path:
    """Without its adapter."""
    config.write_text("".join(line for line in config.read_text().splitlines(True) if not line.startswith(LORA_NAMES)))
    return config


def events(stub: Stub) -> list[str]:
    """Whose weights were loaded, and "." for each prompt that was drawn."""
    seen = []
    for path, body in stub.requests:
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            seen.append(Path(body["kwargs"]["weights_path"]).name.split("-")[0])
        elif path == "/v1/completions" and "prompt_logprobs" not in body:
            seen.append(".")
    return seen


def test_whole_weights_are_sent_once_and_not_while_a_process_draws(start: Start, tmp_path: Path) -> None:
    alone, shared = start(lora=False, seed=7), start(lora=False, seed=7)
    one = full(job(tmp_path / "one", **settings(alone, per_device_train_batch_size=4, **PLAIN)))
    two = full(job(tmp_path / "two", **settings(shared, per_device_train_batch_size=2, **PLAIN)))
    assert train(one) == 0, said(one)
    assert train_as_two(two) == [0, 0], said(two)
    first, then = ["policy", *"........"], ["policy", *"....", "anchor", *"...."]
    assert events(alone) == events(shared) == first + then
    assert asked(shared) == asked(alone)
    same_result(one, two, "model.safetensors", "checkpoint-2/anchor.safetensors")


PROGRAM = """#!/bin/sh
PYTHONPATH={tests}:{src} exec {python} -c '
import sys
from engines.vllm.stub import main
from tiny import tiny_causal, tiny_tokenizer
main(tiny_causal(tiny_tokenizer(), seed=7), sys.argv)' "$@"
"""


def test_one_server_of_the_run_serves_both(tmp_path: Path) -> None:
    """`vllm_server: auto` on a CPU: the first process of the machine starts it; weights go through shared memory."""
    program = tmp_path / "python"
    program.write_text(PROGRAM.format(tests=ROOT / "tests", src=ROOT / "src", python=sys.executable))
    program.chmod(0o755)
    server = {"engine": "vllm", "vllm_server": "auto", "vllm_python": str(program), "save_steps": 100}
    two = full(job(tmp_path / "two", **server, dtype="float32", per_device_train_batch_size=2, **PLAIN))
    assert train_as_two(two) == [0, 0], said(two)
    (log,) = (tmp_path / "two" / "run" / "vllm").glob("*.log")
    loaded = [Path(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("loads ")]
    assert [path.name.split("-")[0] for path in loaded] == ["policy", "policy", "anchor"]
    assert SHARED in loaded[0].parents or not SHARED.is_dir()
    assert not any(path.exists() for path in loaded)


OUT_OF_CACHE = (500, {"error": {"message": "EngineCore: no free KV cache blocks"}})


@pytest.mark.parametrize("answer", [(503, "reset"), OUT_OF_CACHE], ids=["gone", "out of cache"])
def test_a_server_that_fails_one_process_of_four_pauses_all(answer: Answer, start: Start, tmp_path: Path) -> None:
    """In the middle of a step: the steps done are saved, and the same command goes on with another server."""
    bad, good = start(), [start() for _ in range(3)]
    four = job(tmp_path / "four", **settings(*good, bad, per_device_train_batch_size=1))
    drawn_in_two_steps = 2 * 2  # two roles, one prompt
    bad.fault = lambda path, body: (
        answer if path == "/v1/completions" and len(bad.drawn()) > drawn_in_two_steps else None
    )
    assert train_as(4, four) == [7] * 4, said(four)
    assert (tmp_path / "four" / "run" / "checkpoint-2" / "manifest.json").is_file()
    assert said(four).count("process 3: ") >= 4
    assert bad.url in said(four)
    if answer == OUT_OF_CACHE:
        assert "KV cache" in said(four)
        return
    four.write_text(four.read_text().replace(bad.url, start().url))
    assert train_as(4, four) == [0] * 4, said(four)
    assert "training from step 2 to 3" in said(four)


def test_more_processes_than_prompts_do_what_one_does(start: Start, tmp_path: Path) -> None:
    """A process without a prompt of its own draws one that counts nowhere; in an evaluation it draws none."""
    more = {"eval_num_samples": 2, "eval_num_reference_samples": 2, **PLAIN}
    alone, shared = start(), start()
    runs = []
    for processes, stub in ((1, alone), (3, shared)):
        folder = tmp_path / str(processes)
        each = {"per_device_train_batch_size": 1, "eval_dataset": str(folder / "heldout.jsonl")}
        config = job(folder, **settings(stub, **more, **each))
        for name in ("train", "heldout"):
            rows = (folder / f"{name}.jsonl").read_text().splitlines(True)
            (folder / f"{name}.jsonl").write_text(rows[0 if name == "train" else 3])
        assert train_as(processes, config) == [0] * processes, said(config)
        runs.append(config)
    assert set(asked(alone)) == set(asked(shared))
    same_result(*runs, "adapter_model.safetensors", "checkpoint-2/anchor.safetensors")


def stale(path: str, body: Any) -> Answer | None:
    return (200, "ok") if path == "/v1/load_lora_adapter" else None


def test_a_stale_reload_of_one_server_pauses_both(start: Start, tmp_path: Path) -> None:
    good, bad = start(), start()
    two = job(tmp_path / "two", **settings(good, bad, per_device_train_batch_size=2))
    bad.fault = lambda path, body: stale(path, body) if len(bad.drawn()) >= 2 * 2 * 2 else None
    assert train_as_two(two) == [5, 5], said(two)
    assert (tmp_path / "two" / "run" / "checkpoint-2" / "manifest.json").is_file()


def older(answer: dict[str, Any]) -> None:
    for choice in answer["choices"]:
        choice.pop("prompt_token_ids", None)


CONTEXT = {"data": [{"id": "base", "parent": None, "max_model_len": 16}]}  # too short for a prompt


@pytest.mark.parametrize("fault", ["another model", "older", "none", "asleep", "short"])
def test_one_unfit_server_of_two_ends_both_before_training(start: Start, fault: str, tmp_path: Path) -> None:
    good, bad = start(), start(seed=7 if fault == "another model" else 0)
    two = job(tmp_path / "two", **settings(good, bad, per_device_train_batch_size=2))
    if fault == "older":
        bad.spoil = older
    elif fault == "none":
        bad.fault = lambda path, body: (404, "Not Found")
    elif fault == "asleep":
        bad.is_asleep = True
    elif fault == "short":
        bad.fault = lambda path, body: (200, CONTEXT) if path == "/v1/models" else None
    assert train_as_two(two) == [2, 2], said(two)
    assert bad.url in said(two)
    assert good.drawn() == []
