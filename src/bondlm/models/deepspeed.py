"""DeepSpeed's ZeRO (stages 1 to 3): what bondlm supports of it, and how it differs from other kinds of training.

DeepSpeed steps its optimizer inside `backward` of the last micro-batch. Its own check of the gradient's norm, over all
processes, keeps bad gradients from the weights; `step_was_skipped` reports the outcome.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bondlm.errors import ConfigError, NonFiniteError

_CONFIGS = "examples/accelerate/zero2.yaml or zero3.yaml"


def zero_stage(args: Any) -> int:
    """The ZeRO stage, 1 to 3; 0 without DeepSpeed. Known before the model is wrapped."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.deepspeed_config["zero_optimization"]["stage"])


def check_zero(args: Any) -> list[str]:
    """Refuse, before any work, settings that anchor or reference do not support; returns the untested ones.

    Raises:
        ConfigError: a setting is not supported; says what to set instead.
    """
    plugin = args.deepspeed_plugin
    config, zero = plugin.deepspeed_config, plugin.deepspeed_config["zero_optimization"]
    stage, sharing = zero_stage(args), zero.get("zero_hpz_partition_size", 1)
    if getattr(args, "deepspeed", None):
        raise ConfigError(
            f"deepspeed={args.deepspeed!r}: remove it, and start with `accelerate launch` and {_CONFIGS}. It would "
            "partition models while they are loaded, but the anchor is copied from the whole policy"
        )
    if stage not in (1, 2, 3):
        raise ConfigError(f"zero_stage={stage}: DeepSpeed then has no ZeRO to share work with, see {_CONFIGS}")
    devices = {
        what: str((zero.get(what) or {}).get("device", "none")) for what in ("offload_optimizer", "offload_param")
    }
    if devices["offload_param"] == "nvme":
        raise ConfigError(f"offload_param_device=nvme: the anchor reads the policy's parts in memory, see {_CONFIGS}")
    if plugin.zero3_init_flag:
        raise ConfigError(
            f"zero3_init_flag=true: set it to false ({_CONFIGS}). Anchor and reference are made of the policy while it "
            "is whole"
        )
    if sharing != 1 or zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights"):
        raise ConfigError("ZeRO++ (zero_hpz_partition_size, zero_quantized_...): the anchor is not kept in that form")
    if beyond := sorted({"optimizer", "scheduler", "tensor_parallel"} & config.keys()):
        raise ConfigError(f"{beyond[0]!r} in DeepSpeed's config: remove it, the run's settings name these ({_CONFIGS})")
    if args.fp16 or config.get("fp16", {}).get("enabled") is True:
        raise ConfigError(
            "fp16 under DeepSpeed: its model would hold rounded weights, from which small steps vanish, and the anchor "
            "would follow those: use mixed_precision: bf16 or no"
        )
    return ["ZeRO-1"] * (stage == 1) + [
        f"{what}_device={device}" for what, device in devices.items() if device != "none"
    ]


def settle_precision(accelerator: Any, args: Any) -> torch.dtype | None:
    """The compute dtype of autocast, with weights and gradients in fp32; None: no autocast.

    DeepSpeed's own bf16 mode would put rounded weights into the model, in which steps of 1e-6 vanish. Its
    `torch_autocast` does what Trainer does elsewhere.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    from transformers.integrations.deepspeed import propagate_args_to_deepspeed, unset_hf_deepspeed_config

    in_bf16 = accelerator.mixed_precision == "bf16"
    if in_bf16:
        del plugin.deepspeed_config["bf16"]
        # No module's gradients may be averaged in bf16.
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        plugin.deepspeed_config["torch_autocast"] = autocast
        propagate_args_to_deepspeed(accelerator, args)  # otherwise Trainer rounds our tensors to bf16
        accelerator.native_amp = False  # accelerate's autocast would now use the device's default, fp16 on CUDA
    unset_hf_deepspeed_config()  # while it is set, `from_pretrained` also partitions reward models
    return torch.bfloat16 if in_bf16 else None


def step_was_skipped(optimizer: Any) -> bool:
    """Whether DeepSpeed skipped a step because of a gradient that is not finite; the same on all processes.

    Raises:
        NonFiniteError: it took a step although the gradient's norm is not finite or not known.
    """
    skipped, norm = bool(optimizer.step_was_skipped), optimizer.optimizer._global_grad_norm
    if not skipped and (norm is None or not math.isfinite(norm)):
        raise NonFiniteError(
            f"DeepSpeed took a step with a gradient norm of {norm}: these weights may be corrupted. Resume from the "
            "last checkpoint, with deepspeed 0.19 or later and its compute_grad_norm left on"
        )
    return skipped


def stepping(accelerator: Any, learn: Callable[[Any], Tensor]) -> Callable[[Any, bool], Tensor]:
    """`learn` with a flag for the last part of a micro-batch: DeepSpeed may step only after that part."""
    state = accelerator.gradient_state

    def step(part: Any, is_last: bool) -> Tensor:
        ends = state.sync_gradients
        state._set_sync_gradients(ends and is_last)
        try:
            return learn(part)
        finally:
            state._set_sync_gradients(ends)

    return step


def require_same_sharding(checkpoint: Path, args: Any) -> None:
    """Raise ConfigError unless DeepSpeed wrote the checkpoint's optimizer state with the same number of processes.

    Trainer would start with a fresh optimizer if it finds no file that it knows.
    """
    num_parts = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    stage = 0 if not num_parts else 2 if list(checkpoint.glob("global_step*/mp_rank_00_model_states.pt")) else 3
    own = max(2, zero_stage(args)) if zero_stage(args) else 0  # on disk ZeRO-1 looks like ZeRO-2
    now = (own, args.world_size if own else 0)
    if (stage, num_parts) != now:
        said = [f"ZeRO-{s} with {n} processes" if s else "no DeepSpeed" for s, n in ((stage, num_parts), now)]
        raise ConfigError(
            f"{checkpoint.name} was written by {said[0]}, but this run uses {said[1]}: the optimizer's state does not "
            "fit. Start as then, or a new run from these weights in another output_dir"
        )


def load_without_code(engine: Any) -> None:
    """Make this engine read its checkpoints with `weights_only=True`: DeepSpeed would run any code in them."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine.load = load
