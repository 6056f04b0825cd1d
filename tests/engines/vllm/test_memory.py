"""Trainer and server on one card: the arithmetic, by hand; and the sleep of a server, against a stub."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_causal
from transformers import LlamaConfig

from bondlm.engines import choose
from bondlm.engines.vllm.http import VLLMClient
from bondlm.engines.vllm.lora import VLLMEngine
from bondlm.engines.vllm.memory import (
    ASLEEP,
    GIB,
    LOGITS,
    OVERHEAD,
    Growth,
    activation_bytes,
    growth,
    optimizer_bytes,
    server_needs,
    share_card,
)
from bondlm.engines.vllm.server import _environment
from bondlm.errors import ConfigError, ResourceError
from bondlm.models.roles import Roles
from engines.vllm.helpers import ALONE, EOS, PROBE, TOKENIZER, change, config, draw_both
from engines.vllm.stub import Stub

CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)
GROWTH = Growth(resting=2 * GIB, learning=20 * GIB, at_least=10 * GIB)


def share(**changes: Any) -> Any:
    return share_card(**{"total": 80 * GIB, "free": 70 * GIB, "growth": GROWTH, "least": 10 * GIB} | changes)


def test_a_server_that_sleeps_gets_what_the_trainer_leaves_while_it_draws() -> None:
    margin = int(0.03 * 80 * GIB)
    asleep, awake = share(sleeps=True), share(sleeps=False)
    assert asleep.server == 70 * GIB - margin - 2 * GIB
    assert awake.server == 70 * GIB - margin - 20 * GIB
    assert asleep.utilization <= asleep.server / (80 * GIB) < asleep.utilization + 1e-3
    assert "65.6 of 80.0 GiB" in str(asleep)
    assert f"{asleep.utilization:.3f}" in str(asleep)


@pytest.mark.parametrize(
    ("sleeps", "changes", "missing"),
    [
        (False, {"least": 60 * GIB}, 60 - (70 - 2.4 - 10)),  # the server's weights
        (True, {"least": 70 * GIB}, 70 - (70 - 2.4 - 2)),
        (
            True,
            {"growth": Growth(resting=0, learning=69 * GIB, at_least=68 * GIB)},
            68 + ASLEEP / GIB - (70 - 2.4),
        ),  # the trainer itself
    ],
)
def test_what_does_not_fit_says_by_how_much(sleeps: bool, changes: dict[str, Any], missing: float) -> None:
    with pytest.raises(ConfigError, match=rf"{missing:.1f} GiB are missing"):
        share(sleeps=sleeps, **changes)
    share(sleeps=sleeps)


def test_a_run_that_fits_only_while_the_server_sleeps_is_told_so() -> None:
    tight = {"growth": Growth(resting=0, learning=60 * GIB, at_least=60 * GIB)}
    share(sleeps=True, **tight)
    with pytest.raises(ConfigError, match="vllm_sleep"):
        share(sleeps=False, **tight)


def test_what_a_trainer_takes() -> None:
    made = growth(staying=100, gradients=40, activations=1000, least_activations=10, visiting=300)
    # In small micro-batches a copy that visits is the larger thing.
    assert made == Growth(resting=400, learning=100 + 1040 + LOGITS, at_least=400 + LOGITS)


@pytest.mark.parametrize("sleeps", [True, False])
def test_micro_batches_that_can_be_cut_refuse_no_run(sleeps: bool) -> None:
    large = Growth(resting=0, learning=100 * GIB, at_least=20 * GIB)
    tight = share(sleeps=sleeps, growth=large)
    assert tight.cuts
    usable = 70 * GIB - int(0.03 * 80 * GIB)
    assert tight.server == (usable if sleeps else 10 * GIB + (usable - 30 * GIB) // 2)
    assert "cut" in str(tight)
    assert not share(sleeps=sleeps).cuts


@pytest.mark.parametrize(
    ("name", "size"),
    {
        "adamw_torch_fused": 8,
        "adamw_torch": 8,
        "adamw_8bit": 2,
        "paged_lion_8bit": 2,
        "lion_8bit": 1,
        "sgd": 0,
        "adafactor": 1,
        "another": 8,
    }.items(),
)
def test_states_of_optimizers(name: str, size: int) -> None:
    assert optimizer_bytes(name) == size


def test_activations_grow_with_tokens_and_layers() -> None:
    layer = 7 * 2 * (10 * 64 + 4 * 128)
    assert activation_bytes(CONFIG, 7, 2, checkpointing=False) == 3 * layer
    assert activation_bytes(CONFIG, 7, 2, checkpointing=True) == layer + 3 * 7 * 2 * 64


def test_what_a_server_cannot_do_without() -> None:
    keys_and_values = 2 * 3 * 2 * 16 * 2  # layers, heads of 16, bytes
    assert server_needs(CONFIG, 1000, 2, longest=50) == 2000 + 50 * keys_and_values + OVERHEAD


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GiB, of which 70 are free."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))


def on_a_gpu(folder: Path, **changes: Any) -> Any:
    args = config(folder, vllm_server="auto", **changes)
    names = ("vllm_server", "vllm_sleep", "vllm_server_args", "bf16", "fp16", "optim", "average_weights", "anchor")
    names += (
        "max_tokens_per_micro_batch",
        "per_device_train_batch_size",
        "gradient_checkpointing",
        "fsdp",
        "process_index",
        "world_size",
    )
    more = {"objective": "jbond", "device": torch.device("cuda:0")}
    return SimpleNamespace(**{**vars(args), **{name: getattr(args, name) for name in names}, **more})


@pytest.mark.parametrize("whole", [False, True])
def test_options_of_a_server_on_the_trainers_card(whole: bool, card: None, roles: Roles, tmp_path: Path) -> None:
    made = Roles(tiny_causal(TOKENIZER)) if whole else roles
    args = on_a_gpu(tmp_path)
    asleep, size, length = choose.card_options(args, made.model, made, 64)
    needed = choose.trainer_growth(args, made.model, made, 64)
    assert asleep == "--enable-sleep-mode"
    assert length == "--max-model-len=-1"
    expected = (70 * GIB - int(0.03 * 80 * GIB) - needed.resting) / (80 * GIB)
    assert 0 <= expected - float(size.removeprefix("--gpu-memory-utilization=")) < 1.001e-3
    trained = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    visits = 4 * made.core.num_parameters() if whole else 0  # the reference of full fine-tuning
    assert needed.resting == 8 * trained + visits


@pytest.mark.parametrize("option", ["--gpu-memory-utilization 0.3", "--gpu_memory_utilization=0.3"])
def test_who_says_a_size_is_left_alone(option: str, card: None, roles: Roles, tmp_path: Path) -> None:
    args = on_a_gpu(tmp_path, vllm_server_args=option.split(), vllm_sleep="never")
    assert choose.card_options(args, roles.model, roles, 64) == []


def test_a_model_too_large_for_the_card_is_refused(card: None, roles: Roles, tmp_path: Path) -> None:
    args = on_a_gpu(tmp_path, per_device_train_batch_size=2_000_000)
    choose.card_options(args, roles.model, roles, 64)  # alone it cuts its micro-batches
    args.world_size = 2
    with pytest.raises(ConfigError, match="GiB are missing"):
        choose.card_options(args, roles.model, roles, 64)
    args.max_tokens_per_micro_batch = 4096  # several cut them when they are told to
    choose.card_options(args, roles.model, roles, 64)


def test_a_trainer_needs_room_for_the_tokens_that_learn_at_a_time(
    roles: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most, and at least: alone for one completion, of several processes each for one prompt."""
    args, longest, seen = on_a_gpu(tmp_path, per_device_train_batch_size=4), 64, list[int]()
    monkeypatch.setattr(
        choose, "activation_bytes", lambda config, tokens, size, checkpointing: seen.append(tokens) or 0
    )

    def tokens(limit: int | None, processes: int) -> list[int]:
        seen.clear()
        args.max_tokens_per_micro_batch, args.world_size = limit, processes
        choose.trainer_growth(args, roles.model, roles, longest)
        return list(seen)

    per_prompt = 2 * longest  # J-BOND learns from two
    assert tokens(None, 1) == [4 * per_prompt, longest]
    assert tokens(200, 1) == [200, longest]
    assert tokens(1, 1) == [longest, longest]
    assert tokens(None, 2) == [4 * per_prompt, 4 * per_prompt]
    assert tokens(200, 2) == [200, 200]
    assert tokens(1, 2) == [per_prompt, per_prompt]


def test_the_environment_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a launcher; a card of its own; sleep has its routes, and no allocator that it cannot use."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    lora = _environment(False, 1, ["--enable-lora"])
    assert lora["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    assert not any(name.startswith(("RANK", "LOCAL", "MASTER", "TORCHEL", "ACCEL", "FSDP")) for name in lora)
    assert "VLLM_SERVER_DEV_MODE" not in lora
    assert "PYTORCH_CUDA_ALLOC_CONF" in lora
    sleeping = _environment(False, None, ["--enable-lora", "--enable-sleep-mode"])
    assert sleeping["VLLM_SERVER_DEV_MODE"] == "1"
    assert sleeping["CUDA_VISIBLE_DEVICES"] == "4,GPU-7"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in sleeping


# -- sleep


@pytest.fixture
def sleeper(stub: Stub, roles: Roles, tmp_path: Path) -> VLLMEngine:
    client = VLLMClient(stub.url, timeout=20, max_wait=0.02)
    how: Any = {"processes": ALONE, "eos_ids": EOS, "probe_ids": PROBE, "folder": tmp_path, "sleeps": True}
    return VLLMEngine([client], roles.model, roles.adapter_roles, roles.use, **how)


def test_a_server_sleeps_whenever_nothing_is_drawn(sleeper: VLLMEngine, stub: Stub, roles: Roles) -> None:
    """The stub refuses samples and probes while it sleeps, and has lost its adapters when it wakes."""
    assert stub.is_asleep
    for _ in range(2):
        change(roles, 0.01)
        sleeper.sync()
        assert not stub.is_asleep
        drawn = draw_both(sleeper)
        assert stub.is_asleep
    assert draw_both(sleeper) == drawn  # also without new weights
    assert [path for path, _ in stub.requests if path in ("/wake_up", "/sleep?level=1")] == [
        "/sleep?level=1",
        *["/wake_up", "/sleep?level=1"] * 3,
    ]


def test_a_server_that_does_not_wake_up_is_an_error(sleeper: VLLMEngine, stub: Stub) -> None:
    stub.fault = lambda path, body: (200, {}) if path == "/wake_up" else None
    with pytest.raises(ResourceError, match="wake"):
        sleeper.sync()


def test_a_server_that_is_not_to_sleep_is_not_told_to(engine: VLLMEngine, stub: Stub) -> None:
    draw_both(engine)
    assert not [path for path, _ in stub.requests if path.startswith(("/sleep", "/wake"))]


def test_a_server_that_sleeps_at_the_start_is_refused(stub: Stub, roles: Roles, tmp_path: Path) -> None:
    stub.is_asleep = True
    how: Any = {"processes": ALONE, "eos_ids": EOS, "probe_ids": PROBE, "folder": tmp_path}
    client = VLLMClient(stub.url, timeout=20, max_wait=0.02)
    with pytest.raises(ConfigError, match=r"asleep.*/wake_up"):
        VLLMEngine([client], roles.model, roles.adapter_roles, roles.use, **how)
