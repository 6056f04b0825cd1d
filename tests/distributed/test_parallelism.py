"""What is refused before any work: engines that the anchor could not follow."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.training_args import ParallelMode

from bondlm.errors import ConfigError
from bondlm.models.deepspeed import require_same_sharding
from bondlm.models.sharding import check_parallelism, full_precision_outputs


def arguments(**given: Any) -> Any:
    none = {
        "fsdp": "",
        "fsdp_plugin_args": None,
        "deepspeed": None,
        "deepspeed_plugin": None,
        "fp16": False,
        "n_gpu": 1,
        "parallel_mode": ParallelMode.DISTRIBUTED,
    }
    return SimpleNamespace(**none | given)


def zero(stage: int, *, flag: bool = False, beside: dict[str, Any] | None = None, **settings: Any) -> Any:
    """DeepSpeed's settings as accelerate hands them on."""
    config = {"zero_optimization": {"stage": stage, "offload_param": {"device": "none"}} | settings, **(beside or {})}
    return SimpleNamespace(deepspeed_config=config, zero3_init_flag=flag)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_gpu": 2}, "CUDA_VISIBLE_DEVICES"),
        ({"fsdp": "full_shard", "fsdp_plugin_args": {"fsdp_version": 1}}, "fsdp_version=1"),
        ({"fsdp": "full_shard", "fsdp_plugin_args": {}}, "fsdp_version=1"),
        ({"fsdp": True, "parallel_mode": ParallelMode.NOT_PARALLEL}, "fsdp=True divides .* but there is only one"),
        ({"deepspeed": "ds.json", "deepspeed_plugin": zero(2)}, "`accelerate launch`"),
        ({"deepspeed_plugin": zero(0)}, "zero_stage=0"),
        ({"deepspeed_plugin": zero(3, offload_param={"device": "nvme"})}, "offload_param_device=nvme"),
        ({"deepspeed_plugin": zero(3, zero_hpz_partition_size=8)}, "ZeRO\\+\\+"),
        ({"deepspeed_plugin": zero(3, flag=True)}, "zero3_init_flag=true"),
        ({"deepspeed_plugin": zero(2, beside={"optimizer": {"type": "Adam"}})}, "'optimizer'.*DeepSpeed"),
        ({"deepspeed_plugin": zero(2, beside={"fp16": {"enabled": True}})}, "fp16.*DeepSpeed"),
    ],
)
def test_what_the_settings_ask_for(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parallelism(arguments(**given))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"fsdp": "full_shard", "fsdp_plugin_args": {"fsdp_version": 2, "cpu_offload": True}}, "fsdp_offload_params"),
        ({"deepspeed_plugin": zero(1)}, "ZeRO-1"),
        ({"deepspeed_plugin": zero(1, offload_optimizer={"device": "cpu"})}, "ZeRO-1, offload_optimizer_device=cpu"),
        ({"deepspeed_plugin": zero(3, offload_param={"device": "cpu"})}, "offload_param_device=cpu"),
    ],
)
def test_what_no_run_was_made_with_is_one_warning(given: dict[str, Any], what: str) -> None:
    with pytest.warns(UserWarning, match=f"bondlm: {what}") as caught:
        check_parallelism(arguments(**given))
    assert len(caught) == 1


def test_what_the_launcher_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "true")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="fsdp_version=1"):
        check_parallelism(arguments())
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.warns(UserWarning, match="fsdp_offload_params"):
        check_parallelism(arguments())


@pytest.mark.parametrize(
    ("files", "stage", "processes", "message"),
    [
        ([], 0, 2, None),
        (["mp_rank_00_model_states.pt", "0_optim_states.pt", "1_optim_states.pt"], 2, 2, None),
        (["mp_rank_00_model_states.pt", "0_optim_states.pt", "1_optim_states.pt"], 1, 2, None),
        (["zero_pp_rank_0_mp_rank_00_model_states.pt", "0_optim_states.pt", "1_optim_states.pt"], 3, 2, None),
        ([], 2, 2, "no DeepSpeed.*ZeRO-2 with 2 processes"),
        (["mp_rank_00_model_states.pt", "0_optim_states.pt"], 0, 1, "ZeRO-2 with 1 processes.*no DeepSpeed"),
        (["mp_rank_00_model_states.pt", "0_optim_states.pt"], 2, 2, "ZeRO-2 with 1 processes.*ZeRO-2 with 2 processes"),
        (["mp_rank_00_model_states.pt", "0_optim_states.pt"], 3, 1, "ZeRO-2 with 1 processes.*ZeRO-3"),
    ],
)
def test_a_checkpoint_is_resumed_as_it_was_sharded(
    files: list[str], stage: int, processes: int, message: str | None, tmp_path: Path
) -> None:
    (tmp_path / "global_step4").mkdir()
    for name in files:
        (tmp_path / "global_step4" / name).touch()
    now = arguments(world_size=processes, deepspeed_plugin=zero(stage) if stage else None)
    if message is None:
        require_same_sharding(tmp_path, now)
    else:
        with pytest.raises(ConfigError, match=message):
            require_same_sharding(tmp_path, now)


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    check_parallelism(arguments())
    for stage in (2, 3):
        check_parallelism(arguments(deepspeed_plugin=zero(stage, beside={"bf16": {"enabled": True}})))
    check_parallelism(arguments(fsdp="full_shard", fsdp_plugin_args={"fsdp_version": 2, "cpu_offload": False}))
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), ("FSDP_OFFLOAD_PARAMS", "false")):
        monkeypatch.setenv(name, value)
    check_parallelism(arguments())


def test_fsdp_in_bf16_adds_gradients_up_in_fp32() -> None:
    """As DDP and ZeRO do; accelerate would have all three in bf16."""
    plain = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=plain)
    full_precision_outputs(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), asked_for=True)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
