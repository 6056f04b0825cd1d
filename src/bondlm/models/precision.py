"""The dtypes in which weights are loaded and trained.

Trained weights are fp32: a step of 1e-6 is lost in a bf16 weight of 0.1, whose neighbours are 5e-4 away.
"""

import logging
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from transformers import PreTrainedModel

from bondlm.errors import ConfigError
from bondlm.models.sharding import shards_weights, uses_fsdp

_log = logging.getLogger(__name__)


def check_precision(args: Any) -> None:
    """Refuse fp16 where no loss scale is shared by all processes, because small gradients would vanish.

    Raises:
        ConfigError: fp16 on a CPU, or under FSDP2 (`bondlm.models.deepspeed` refuses it under DeepSpeed).
    """
    if args.fp16 and args.device.type == "cpu":
        raise ConfigError("fp16=True on a CPU: accelerate scales the loss on GPUs only. Use bf16=True, or neither")
    if args.fp16 and uses_fsdp(args):
        raise ConfigError("fp16=True under FSDP2: each process would find a loss scale of its own. Use bf16=True")


def take_dtype(init_kwargs: dict[str, Any], *, setting: str) -> torch.dtype | str | None:
    """Take `dtype`, or its old name `torch_dtype`, out of `model_init_kwargs`; None if it is not there.

    Raises:
        ConfigError: it is not a floating-point dtype, or it contradicts the setting `dtype`.
    """
    asked = [init_kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in init_kwargs]
    found = {value if isinstance(value, torch.dtype) else _by_name(value) for value in asked if value is not None}
    if len(found) > 1:
        raise ConfigError("model_init_kwargs: dtype and torch_dtype are two names for one setting, but they differ")
    dtype = next(iter(found), None)
    if dtype is not None and setting != "auto" and dtype != getattr(torch, setting):
        raise ConfigError(f"dtype={setting} and model_init_kwargs.dtype={dtype} differ: remove one of them")
    return dtype


def _by_name(value: Any) -> torch.dtype | str:
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if value == "auto":  # as everywhere in transformers: the dtype of the checkpoint
        return "auto"
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"model_init_kwargs.dtype={value!r}: use float32, bfloat16, float16 or auto")
    return dtype


def train_in_fp32(model: PreTrainedModel | PeftModel, *, autocast: bool) -> None:
    """Convert trained weights to fp32, and log it.

    An adapter's layers cast their inputs, so the frozen base keeps its dtype. Other trained weights with a base in half
    precision (`modules_to_save`) need autocast; without it the whole model becomes fp32.

    Raises:
        ConfigError: the weights are quantised or already partitioned, and cannot be converted to fp32.
    """
    if isinstance(model, PeftModel):
        for name in model.peft_config:
            cast_adapter_dtype(model, name)
    halves = [p for p in model.parameters() if p.requires_grad and p.is_floating_point() and p.dtype.itemsize < 4]
    if not halves:
        return
    was, before = halves[0].dtype, _num_bytes(model)
    if any(hasattr(p, "ds_tensor") for p in halves):
        raise ConfigError(f"the model trains in {was} and DeepSpeed has partitioned it: load it with dtype=float32")
    if isinstance(model, PeftModel) and autocast:
        for parameter in halves:
            parameter.data = parameter.data.float()
    elif getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        raise ConfigError(
            "weights next to the adapter train (modules_to_save) on a quantised model: set bf16=True, so that they can "
            "be fp32 and the rest stays as it is"
        )
    else:
        model.float()
    _log.warning(
        "trainable weights in %s would lose small updates: converted to float32, %.2f GiB in all instead of %.2f "
        "(bf16=True still computes in bfloat16)",
        str(was).removeprefix("torch."),
        _num_bytes(model) / 2**30,
        before / 2**30,
    )


class Fp32Head(nn.Linear):
    """A head that computes logits in fp32, even under autocast: a bf16 logit near 20 is a multiple of 1/8."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) fp32 of hidden states (..., D) of any dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)


def settle_head(model: PreTrainedModel | PeftModel, args: Any) -> None:
    """With `cast_lm_head_to_fp32`, make the head compute in fp32, also in copies of the model.

    Raises:
        ConfigError: the head is not a plain linear layer, is tied to an embedding in half precision, or would be
            gathered in half precision.
    """
    if not args.cast_lm_head_to_fp32:
        return
    core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head, refused = core.get_output_embeddings(), "cast_lm_head_to_fp32=True: "
    if type(head) not in (nn.Linear, Fp32Head):  # the second if the model was used before
        raise ConfigError(
            f"{refused}the head is a {type(head).__name__} and no plain linear layer; remove the setting, or leave the "
            "head out of the adapter and of the quantisation"
        )
    if shards_weights(args):
        raise ConfigError(f"{refused}sharded weights may be gathered in half precision, the head's too; remove it")
    if head.weight.dtype != torch.float32 and head.weight is core.get_input_embeddings().weight:
        raise ConfigError(
            f"{refused}the head is the embedding, which is {head.weight.dtype} here; set dtype='float32', with "
            "bf16=True to compute the other layers in bfloat16"
        )
    head.float()
    head.__class__ = Fp32Head  # not a replaced `forward`, with which a copy of the model would call the original's


def _num_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.dtype.itemsize for p in model.parameters())
