"""Rows S1 to S10 of the fault matrix on one process: signals, memory, the clock, the logs."""

import ast
import json
import os
import re
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer.helpers import Gradients, lora, same, trainer, weights

from bondlm.engines.local.engine import TransformersEngine
from bondlm.errors import ResourceError
from bondlm.models.anchor import Anchor
from bondlm.runs.manifest import fault
from bondlm.trainer import BONDTrainer
from bondlm.training import callbacks, logs
from bondlm.training.micro_batches import size_of
from faults.children import job, outcome, said, train, wrap

MOMENTS: dict[str, tuple[Any, str]] = {
    "sampling": (TransformersEngine, "generate_roles"),
    "backward": (BONDTrainer, "training_step"),
    "anchor": (Anchor, "update"),
    "saving": (callbacks, "save_tensors"),
    "sealing": (callbacks, "seal"),
}


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def stopped_at(config: Path, moment: str, number: int) -> int | None:
    owner, name = MOMENTS[moment]
    return train(config, lambda: wrap(owner, name, 2, send(number), after=False))


def checkpoints(config: Path) -> list[str]:
    found = sorted((config.parent / "run").glob("checkpoint-*"))
    assert all(fault(path) is None for path in found)
    return [path.name for path in found]


@pytest.mark.parametrize("moment", ["sampling", "backward", "anchor"])
def test_s1_sigterm(moment: str, straight: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "job", save_steps=100)
    began = time.monotonic()
    assert stopped_at(config, moment, signal.SIGTERM) == 75, said(config)
    assert time.monotonic() - began < 30
    assert checkpoints(config) == ["checkpoint-2"]  # the step was finished and saved
    assert train(config) == 0
    expected = outcome(straight)
    mine = outcome(config)
    assert mine == expected


def test_s1_sigterm_in_the_last_evaluation_does_not_wait_for_it(tmp_path: Path) -> None:
    config = job(tmp_path / "job", eval_dataset=str(tmp_path / "job" / "heldout.jsonl"), max_steps=1)
    code = train(config, lambda: wrap(BONDTrainer, "sample", 1, send(signal.SIGTERM), after=False))
    assert code == 75, said(config)
    run = config.parent / "run"
    assert (run / "adapter_model.safetensors").is_file()
    assert not (run / "eval.json").exists()
    assert train(config) == 0
    assert (run / "eval.json").is_file()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 0)])
def test_s1_a_signal_while_the_run_is_loaded(number: int, code: int, straight: Path, tmp_path: Path) -> None:
    """There is nothing to finish and nothing to save: it stops, or is let pass."""
    config = job(tmp_path / "job")
    assert train(config, lambda: wrap(BONDTrainer, "__init__", 1, send(number), after=False)) == code, said(config)
    assert bool(checkpoints(config)) is (code == 0)
    assert train(config) == 0
    assert outcome(config) == outcome(straight)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_s1_sigterm_in_the_last_save(after: bool, tmp_path: Path) -> None:
    """The model is whole, its evaluation is left out, and the same command makes it."""
    config = job(tmp_path / "job", eval_dataset=str(tmp_path / "job" / "heldout.jsonl"), max_steps=1)
    run = config.parent / "run"
    last = wrap_last_save(after)
    assert train(config, last) == 75, said(config)
    assert "stopped by SIGTERM" in said(config)
    assert (run / "adapter_model.safetensors").is_file()
    assert not (run / "eval.json").exists()
    assert train(config) == 0
    assert (run / "eval.json").is_file()


def wrap_last_save(after: bool) -> Callable[[], None]:
    return lambda: wrap(BONDTrainer, "save_model", 2, send(signal.SIGTERM), after=after)  # the first is a checkpoint's


@pytest.mark.parametrize("moment", ["sampling", "backward"])
def test_s2_sigusr1(moment: str, straight: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "job", save_steps=100)
    assert stopped_at(config, moment, signal.SIGUSR1) == 0
    assert checkpoints(config) == ["checkpoint-2", "checkpoint-3"]
    assert outcome(config) == outcome(straight)


def test_s3_sigint_once(straight: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "job", save_steps=100)
    assert stopped_at(config, "backward", signal.SIGINT) == 130
    assert checkpoints(config) == ["checkpoint-2"]
    assert train(config) == 0
    assert outcome(config) == outcome(straight)


def test_s3_sigint_twice_stops_at_once(straight: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "job")

    def twice() -> None:
        send(signal.SIGINT)()
        time.sleep(0.2)  # two of a kind that arrive together are one
        send(signal.SIGINT)()

    assert train(config, lambda: wrap(BONDTrainer, "training_step", 2, twice)) == 130
    assert checkpoints(config) == ["checkpoint-1"]  # step 2 was not finished
    assert train(config) == 0
    assert outcome(config) == outcome(straight)


@pytest.mark.parametrize("moment", ["saving", "sealing"])
def test_s4_sigterm_during_save(moment: str, straight: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "job")
    assert stopped_at(config, moment, signal.SIGTERM) == 75
    assert checkpoints(config) == ["checkpoint-1", "checkpoint-2"]  # no step more, no second save
    assert train(config) == 0
    assert outcome(config) == outcome(straight)


# -- memory


class Small:
    """The model's forward pass, which takes no more than so many tokens when it learns."""

    def __init__(self, made: BONDTrainer, most: int, error: Exception) -> None:
        self.sizes: list[int] = []
        plain = made.compute_loss

        def compute_loss(model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(size_of(inputs)[1])
            loss = plain(model, inputs, *args, **kwargs)
            if size_of(inputs)[1] > most:
                parameter = next(p for p in made.roles.model.parameters() if p.requires_grad)
                parameter.grad = torch.full_like(parameter, 7.0)  # what a backward pass cut short may leave
                raise error
            return loss

        made.compute_loss = compute_loss  # type: ignore[method-assign]


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("kind", ["llama", "t5", "lora"])
@pytest.mark.parametrize("most", [34, 60])
def test_s6_out_of_memory_in_forward(kind: str, most: int, tmp_path: Path) -> None:
    """Batches of 4 and an accumulation of 2; the memory fails at the second batch of the window, too."""
    from trainer.helpers import MODELS, TOKENIZER, ends_often

    def run(name: str, limit: int | None) -> tuple[BONDTrainer, Gradients]:
        gradients = Gradients()
        torch.manual_seed(0)
        made = trainer(
            tmp_path / name,
            ends_often(MODELS.get(kind, MODELS["llama"])(TOKENIZER)),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            callbacks=[gradients],
            peft_config=lora() if kind == "lora" else None,
        )
        if limit is not None:
            small = Small(made, limit, out_of_memory())
            with pytest.warns(
                UserWarning, match=r"out of memory.*learning from 8 .* (\d+) tokens.*continuing with \d+"
            ):
                made.train()
            failed = [size for size in small.sizes if size > limit]
            assert failed == sorted(failed, reverse=True)
            assert len(failed) <= 3  # the size is remembered
            assert made._smaller.max_tokens == failed[-1] // 2
        else:
            made.train()
        return made, gradients

    cut, gradient = run("cut", most)
    whole, expected = run("whole", None)
    for name, value in expected.first.items():
        scale = float(value.abs().max()) + 1e-6
        torch.testing.assert_close(gradient.first[name], value, atol=2e-5 * scale, rtol=1e-4)
    for name, weight in weights(whole.roles.model).items():
        torch.testing.assert_close(weights(cut.roles.model)[name], weight, atol=1e-5, rtol=1e-4)
    assert cut.state.global_step == 2


def test_s6_at_one_completion_it_ends_with_7_and_advice(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    Small(made, 0, out_of_memory())
    before = weights(made.roles.model)
    warnings.simplefilter("ignore")  # pytest restores it
    with pytest.raises(ResourceError, match=r"learning from 1 completion.*gradient_checkpointing") as caught:
        made.train()
    assert caught.value.exit_code == 7
    assert same(weights(made.roles.model), before)


def test_s7_out_of_memory_in_generation(tmp_path: Path) -> None:
    whole, small = trainer(tmp_path / "whole"), trainer(tmp_path / "small")
    plain = small.engine._decode

    def decode(model: Any, prompts: Any, chunk: list[Any], *args: Any) -> Any:
        if len(chunk) > 2:
            raise out_of_memory()
        return plain(model, prompts, chunk, *args)

    small.engine._decode = decode  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"out of memory.*\b4 rows.*\b2\b"):
        small.train()
    whole.train()
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "small")]
    texts = [[[s["text"] for s in json.loads(line)["policy"]] for line in text.splitlines()] for text in samples]
    assert texts[0] == texts[1]
    for name, weight in weights(whole.roles.model).items():
        torch.testing.assert_close(weights(small.roles.model)[name], weight, atol=1e-6, rtol=1e-5)


def test_s8_an_error_that_only_mentions_memory_is_not_retried(tmp_path: Path) -> None:
    for error in (ValueError("memory"), RuntimeError("the memory of the crowd"), KeyError("CUDA out of memory")):
        made = trainer(tmp_path)
        small = Small(made, 0, error)
        with pytest.raises(type(error), match="memory"):
            made.train()
        assert len(small.sizes) == 1
        assert made._smaller.max_tokens is None


def test_s9_no_interval_is_measured_by_the_wall_clock() -> None:
    source = Path(__file__).parents[2] / "src" / "bondlm"
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("time.time", "datetime.now", "datetime.datetime.now"), f"{path}:{node.lineno}"


def test_s10_a_log_that_cannot_be_written(straight: Path, tmp_path: Path) -> None:
    """It becomes a folder at step 2. The step's weights are saved all the same."""
    config = job(tmp_path / "job", save_steps=100)
    run = config.parent / "run"

    def block() -> None:
        (run / "metrics.jsonl").rename(run / "kept")
        (run / "metrics.jsonl").mkdir()

    assert train(config, lambda: wrap(Anchor, "update", 2, block)) == 7
    assert re.search(r"metrics\.jsonl .*Is a directory", said(config))
    assert checkpoints(config) == ["checkpoint-2"]
    (run / "metrics.jsonl").rmdir()
    shutil.move(run / "kept", run / "metrics.jsonl")
    assert train(config) == 0
    expected, mine = outcome(straight), outcome(config)
    assert [row["step"] for row in mine["steps"]] == [
        1,
        3,
    ]  # the row that could not be written is lost, its step is not
    assert mine["adapter_model.safetensors"] == expected["adapter_model.safetensors"]


def test_s10_a_failure_that_passes_is_not_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = logs.append_jsonl, 0

    def once(path: Path, rows: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(5, "Input/output error", str(path))
        plain(path, rows)

    monkeypatch.setattr(logs, "append_jsonl", once)
    trainer(tmp_path).train()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()] == [1, 2, 2]
