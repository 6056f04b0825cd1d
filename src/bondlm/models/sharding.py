"""Weights sharded over processes: gathering them, working on one process's part, an unsharded twin of a model.

FSDP2 turns a weight into a `DTensor`. ZeRO-3 leaves an empty parameter with a `ds_tensor`, this process's equal share
of the flattened weight, and a `ds_shape`; copies of such a part have the same form.

A process that generates calls its model once per token of its longest completion, so the number of calls differs
between processes. A sharded model gathers weights inside its forward pass, so processes with different numbers of calls
would wait for each other forever. The sharded model therefore never generates: its weights are gathered once, into an
unsharded twin (`Replica`) that releases them afterwards.
"""

import copy
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.training_args import ParallelMode

from bondlm.errors import ConfigError
from bondlm.models.deepspeed import check_zero, zero_stage

_TRUE = ("1", "true", "yes", "y", "on", "t")
# Parts that activation checkpointing and `torch.compile` add to the names of parameters.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def uses_fsdp(args: Any) -> bool:
    """Whether the launcher or the settings ask for FSDP; known before the model is wrapped."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in _TRUE


def shards_weights(args: Any) -> bool:
    """Whether each process will hold a part of the weights (FSDP, ZeRO-3)."""
    return uses_fsdp(args) or zero_stage(args) == 3


def trained_in_parallel(args: Any) -> bool:
    """Whether Trainer wraps the model (DDP, FSDP), even if torchrun started a single process."""
    return bool(args.parallel_mode != ParallelMode.NOT_PARALLEL)


def check_parallelism(args: Any) -> None:
    """Refuse, before any work, settings that the anchor does not support, and warn of untested settings.

    Raises:
        ConfigError: several GPUs in one process, FSDP in a single process or of version 1, or settings that
            `check_zero` refuses.
    """
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs are visible to one process, which would train on copies of the model that the anchor "
            "does not follow: use `accelerate launch` with a process for each, or choose one (CUDA_VISIBLE_DEVICES=0)"
        )
    untried: list[str] = []
    if args.fsdp and not trained_in_parallel(args):
        raise ConfigError(
            f"fsdp={args.fsdp!r} divides the weights among processes, but there is only one: start several with "
            "`accelerate launch` or torchrun, or remove it"
        )
    if uses_fsdp(args):
        settings = args.fsdp_plugin_args or {}
        version = settings.get("fsdp_version", os.environ.get("FSDP_VERSION", 1))
        if str(version) != "2":
            raise ConfigError(
                f"fsdp_version={version}: the anchor is sharded as the policy is, and needs FSDP2: set fsdp_version: 2 "
                "(examples/accelerate/fsdp2.yaml)"
            )
        offload = settings.get("cpu_offload", os.environ.get("FSDP_OFFLOAD_PARAMS", "false"))
        if str(offload).lower() in _TRUE:
            untried.append("fsdp_offload_params=true")
    if getattr(args, "deepspeed_plugin", None) is not None:
        untried += check_zero(args)
    if untried:
        warnings.warn(
            f"bondlm: {', '.join(untried)}: this is untested with bondlm. Compare the loss, `kl` and "
            "`anchor/kl` of the first steps with those of a run without (docs/scaling.md)",
            stacklevel=2,
        )


def full_precision_outputs(accelerator: Any, *, asked_for: bool) -> None:
    """Make FSDP return outputs in fp32 and average gradients in fp32, as DDP and ZeRO do.

    accelerate sets both to the compute dtype, but a log-probability in bf16 is off by up to 0.4%, and so is each sum of
    two processes' gradients.

    Raises:
        ConfigError: FSDP was `asked_for`, but accelerate does not shard here.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if asked_for != (plugin is not None):
        raise ConfigError(
            "FSDP is asked for, but accelerate shards nothing here: it needs more than one process, each with a GPU "
            "(on CPUs use examples/accelerate/ddp.yaml)"
        )
    if plugin is not None and plugin.mixed_precision_policy is not None:
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, output_dtype=torch.float32, reduce_dtype=torch.float32)


def forward_dtype(accelerator: Any) -> torch.dtype | None:
    """The dtype that FSDP's mixed precision casts weights to; None: they are not cast, as under ZeRO-3."""
    policy = getattr(getattr(accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    return None if policy is None else policy.param_dtype


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds only a part of this tensor."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_tensor")


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return getattr(tensor, "ds_shape", tensor.shape)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor (it shares its memory); any other tensor itself."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if hasattr(tensor, "ds_tensor"):
        begin, end = _zero_range(tensor)
        return tensor.ds_tensor[: end - begin]  # without the last ones' padding (uninitialised memory)
    return tensor


def whole(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """The whole tensor. If it is sharded, every process must call this."""
    if hasattr(tensor, "ds_tensor"):
        part = tensor.ds_tensor.detach() if device is None else tensor.ds_tensor.detach().to(device)
        parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, part)
        shape = whole_shape(tensor)
        return torch.cat(parts)[: shape.numel()].view(shape)
    tensor = tensor.detach() if device is None else tensor.detach().to(device)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy without gradient, sharded as `tensor` is."""
    if not hasattr(tensor, "ds_tensor"):
        return tensor.detach().to(dtype or tensor.dtype, copy=True)
    part: Any = torch.empty(0, dtype=dtype or tensor.dtype)
    part.ds_tensor = tensor.ds_tensor.detach().to(part.dtype, copy=True)
    part.ds_shape = whole_shape(tensor)
    return part  # type: ignore[no-any-return]


def num_copies(tensor: Tensor) -> int:
    """How many processes hold the same part of a sharded tensor (1 unless it is replicated as well)."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(tensor.placements) if placement.is_replicate())


def refuse_other_tensors(what: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise KeyError or ValueError unless a state from a file has the names and whole shapes of our own."""
    if state.keys() != own.keys():
        missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
        raise KeyError(f"{what} does not fit: missing {sorted(missing)[:3]}, unexpected {sorted(extra)[:3]}")
    for name, tensor in own.items():
        if state[name].shape != whole_shape(tensor):  # `copy_` would broadcast
            shapes = f"{tuple(state[name].shape)}, not {tuple(whole_shape(tensor))}"
            raise ValueError(f"{what} does not fit: {name} is {shapes}")


@torch.no_grad()
def assign(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into `target`; a sharded target takes its part, without communication."""
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        source = distribute_tensor(source.to(target.device), mesh, placements, src_data_rank=None).to_local()
    elif hasattr(target, "ds_tensor"):
        begin, end = _zero_range(target)
        source = source.flatten()[begin:end]
    local(target).copy_(source)


def _zero_range(tensor: Any) -> tuple[int, int]:
    """The range of the flattened weight that this process holds."""
    size, total = tensor.ds_tensor.numel(), whole_shape(tensor).numel()
    begin = min(torch.distributed.get_rank() * size, total)
    return begin, min(begin + size, total)


def gather_to_main(tensors: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Tensor]:
    """Gather all tensors on the CPU of the main process, one at a time, so that no other process holds all of them."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if is_main:
            gathered[name] = full.cpu().contiguous()
    return gathered


def named_weights(model: nn.Module, *, every_name: bool = False) -> dict[str, nn.Parameter]:
    """Parameters by their names before the model was wrapped; a tied one once, or with `every_name` under each name."""
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=not every_name):
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        weights[name] = parameter
    return weights


class Replica:
    """An unsharded twin of a model that is sharded later; it has no own weights and borrows them while in use."""

    def __init__(self, model: nn.Module) -> None:
        """Copy everything but the weights."""
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in model.parameters()}
        self._model = copy.deepcopy(model, dict(empty)).eval()
        self.device = torch.device("cpu")
        self.dtype: torch.dtype | None = None  # dtype of the weights in use; None: unchanged

    @property
    def plain(self) -> Any:
        """The twin without weights, of the model's own class, to write its files with."""
        return self._model

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[Any]:
        """Lend the twin with these weights, gathered from all processes; every process must call this."""
        before = dict(self._model.named_parameters(remove_duplicate=False))
        try:
            self._fill(weights)
            yield self._model
        finally:
            for name, parameter in before.items():
                self._put(name, parameter)

    def _fill(self, weights: Mapping[str, Tensor]) -> None:
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        gathered: dict[int, nn.Parameter] = {}  # a tied weight is gathered once
        for name, tensor in weights.items():
            if id(tensor) not in gathered:
                full = whole(tensor, self.device)
                full = full.to(self.dtype) if self.dtype is not None and full.is_floating_point() else full
                gathered[id(tensor)] = nn.Parameter(full, requires_grad=False)
            self._put(name, gathered[id(tensor)])

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(owner), leaf, parameter)
