"""The three roles that training needs: policy, anchor, reference.

With LoRA the three share one set of base weights: policy and anchor are two adapters, and the reference is the base
with its adapters off (or, when training starts from an adapter, a third, frozen one). With full fine-tuning the
anchor and the reference are frozen copies. Under FSDP2 and ZeRO-3 each process holds its part of all three, and a role
that samples or scores gets them gathered in a plain twin (`bondlm.models.sharding`).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from bondlm.errors import ConfigError
from bondlm.models.row_adapters import RowAdapters, can_join, joined
from bondlm.models.sharding import Replica, copied, gather_to_main, named_weights

ANCHOR_ADAPTER = "anchor"
REFERENCE_ADAPTER = "reference"


class Roles:
    """The models of the three roles; `use(role)` lends one for sampling or scoring.

    `model` is what the trainer trains. `anchor_pairs` lists the (anchor, policy) parameters that an update couples.
    """

    def __init__(
        self, model: Any, *, sharded: bool = False, anchor_moves: bool = True, offload_anchor: bool = False
    ) -> None:
        """Create the anchor and the reference, both equal to the policy as it is now.

        A model that will be `sharded` gets them in `on_sharded`; until then all three are the policy. With
        `offload_anchor` a full copy rests on the CPU between its uses, as the reference's always does. An anchor that
        never moves and the reference are one copy.

        Raises:
            ConfigError: the model has no copy to offload.
        """
        self.model = model
        self.is_peft = isinstance(model, PeftModel)
        self._reference_adapter: str | None = None
        self._copies: dict[str, nn.Module] = {}
        self.autocast: torch.dtype | None = None  # what Trainer's mixed precision learns in: all roles compute in it
        self._device: torch.device | None = None
        self._shards: dict[str, dict[int, torch.Tensor]] | None = None  # by the identity of the policy's parameter
        if self.is_peft:
            self._add_adapters(model)
        elif not sharded:
            anchor = _frozen_copy(model)
            self._copies = {"anchor": anchor, "reference": _frozen_copy(model) if anchor_moves else anchor}
        if offload_anchor and not self._copies:
            raise ConfigError(
                "offload_anchor=True: remove it. With LoRA the anchor is an adapter, under FSDP2 and ZeRO-3 a part of "
                "a copy; only the whole copy of full fine-tuning can rest on the CPU"
            )
        self._at_rest_on_cpu = {"anchor", "reference"} if offload_anchor else {"reference"} if anchor_moves else set()
        self._replica = Replica(model) if sharded else None

    @torch.no_grad()
    def on_sharded(self, dtype: torch.dtype | None) -> None:
        """Take this process's part of anchor and reference; its weights, not yet trained, have just been sharded.

        `dtype` is that of the forward pass in mixed precision: what samples must compute as what learns.
        """
        if self._replica is None or self._shards is not None:  # not sharded, or a second `train`
            return
        self._replica.dtype = dtype
        start = [] if self.is_peft else [p for p in self.model.parameters() if p.requires_grad]
        self._shards = {role: {id(p): copied(p) for p in start} for role in ("anchor", "reference")}

    def _add_adapters(self, model: PeftModel) -> None:
        self.policy_adapter = model.active_adapter
        config = model.peft_config[self.policy_adapter]
        start = get_peft_model_state_dict(model, adapter_name=self.policy_adapter)
        names = [ANCHOR_ADAPTER]
        trainable = _trainable_names(model)
        if not _adapter_is_identity(start):  # the run continues an adapter: its start is the reference
            names.append(REFERENCE_ADAPTER)
            self._reference_adapter = REFERENCE_ADAPTER
        for name in names:
            model.add_adapter(name, copy.deepcopy(config))
            set_peft_model_state_dict(model, start, adapter_name=name)
        model.set_adapter(self.policy_adapter)
        _train_only(model, trainable)

    @property
    def core(self) -> Any:
        """The transformers model, without PEFT's wrapper around it (the adapters sit inside its layers)."""
        return self.model.get_base_model() if self.is_peft else self.model

    @property
    def anchor_pairs(self) -> list[tuple[str, torch.Tensor, nn.Parameter]]:
        """(name, anchor weight, policy parameter) of all that trains; none before a model to shard is sharded."""
        if self._replica is not None and self._shards is None:
            return []
        parameters = named_weights(self.model)
        if not self.is_peft:
            if self._shards is not None:
                shards = self._shards["anchor"]
                return [(n, shards[id(p)], p) for n, p in parameters.items() if p.requires_grad]
            anchors = dict(self._copies["anchor"].named_parameters())
            return [(n, anchors[n], p) for n, p in parameters.items() if p.requires_grad]
        mine, theirs = f".{self.policy_adapter}.", f".{ANCHOR_ADAPTER}."
        return [
            (name, parameters[name.replace(mine, theirs)], parameter)
            for name, parameter in parameters.items()
            if mine in name and name.replace(mine, theirs) in parameters
        ]

    def use_together(self, roles: Sequence[str]) -> AbstractContextManager[tuple[Any, RowAdapters]] | None:
        """Lend one model for several roles, and what says which row is whose; None if they are not adapters of one."""
        adapters = {"policy": self.policy_adapter, "anchor": ANCHOR_ADAPTER} if self.is_peft else {}
        names = [adapters[role] for role in roles if role in adapters]
        # The policy's adapter is the active one: it comes first.
        if len(names) < len(roles) or roles[0] != "policy" or not can_join(self.model, names):
            return None
        return self._use_joined(names)

    @contextmanager
    def _use_joined(self, names: Sequence[str]) -> Iterator[tuple[Any, RowAdapters]]:
        replica, weights = self._replica, named_weights(self.model, every_name=True)
        with nullcontext(self.model) if replica is None else replica.holding(weights) as model:
            rows = RowAdapters(len(names), next(model.parameters()).device)
            with (
                _eval_mode(model.get_base_model()) as core,
                joined(model, names, rows),
                computing_in(core, self.autocast),
            ):
                yield core, rows

    @contextmanager
    def use(self, role: str) -> Iterator[Any]:
        """Lend the model of `role` in eval mode; the policy is active and trainable again afterwards, come what may.

        Of a sharded model every process must ask for the same roles in the same order.
        """
        if self._replica is not None:
            own = (self._shards or {}).get(role, {})
            weights = {n: own.get(id(p), p) for n, p in named_weights(self.model, every_name=True).items()}
            with self._replica.holding(weights) as twin, self._adapter_of(twin, role):
                core = twin.get_base_model() if self.is_peft else twin
                # FSDP's forward pass casts weights, as the replica then does; ZeRO-3 learns under autocast.
                with computing_in(core, self.autocast if self._replica.dtype is None else None):
                    yield core
            return
        if not self.is_peft:
            model = self.model if role == "policy" else self._copies[role]
            with _eval_mode(model), _visiting(model, self._device) if role in self._at_rest_on_cpu else nullcontext():
                with computing_in(model, self.autocast):
                    yield model
            return
        with _eval_mode(self.core) as core, self._adapter_of(self.model, role), computing_in(core, self.autocast):
            yield core

    @contextmanager
    def _adapter_of(self, model: Any, role: str) -> Iterator[None]:
        if not self.is_peft:
            yield
            return
        name = {"policy": self.policy_adapter, "anchor": ANCHOR_ADAPTER, "reference": self._reference_adapter}[role]
        if role == "policy":
            yield
            return
        # PEFT makes all of an adapter trainable that it activates, also what the user has frozen (A of LoRA, say).
        trainable = _trainable_names(model)
        try:
            with model.disable_adapter() if name is None else nullcontext():
                if name is not None:
                    model.set_adapter(name)
                yield
        finally:
            model.set_adapter(self.policy_adapter)
            _train_only(model, trainable)

    def to(self, device: torch.device) -> None:
        """Move the anchor's copy (the trainer moves the policy) unless it waits on the CPU, as the reference does."""
        self._device = device
        if "anchor" in self._copies and "anchor" not in self._at_rest_on_cpu:
            self._copies["anchor"].to(device)
        if self._replica is not None:
            self._replica.device = device

    def keep_reference(self) -> None:
        """Give the reference a copy of its own if it shares the anchor's, which is about to get other weights."""
        if self._copies and self._copies["anchor"] is self._copies["reference"]:
            self._copies["reference"] = _frozen_copy(self._copies["anchor"]).to("cpu")
            self._at_rest_on_cpu.add("reference")

    def save(self, folder: str, *, is_main: bool) -> None:
        """Write the policy, or its adapter alone, as `from_pretrained` reads it; a sharded one is gathered for that.

        If it is sharded every process must call this; only the main one writes, and only it holds all of the weights.
        """
        model, state = self.model, None
        if self._replica is not None:
            wanted = f".{self.policy_adapter}." if self.is_peft else ""
            weights = {name: w for name, w in named_weights(model).items() if wanted in name}
            model, state = self._replica.plain, gather_to_main(weights, is_main=is_main)
        only = {"selected_adapters": [self.policy_adapter]} if self.is_peft else {}
        if is_main:
            model.save_pretrained(folder, state_dict=state, **only)


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to `dtype`, linear layers' weights cast once and not at every call: the same numbers, for less.

    Autocast keeps a cast weight only if it trains, and only within one call of the model: decoding would cast all
    weights at every token.
    """
    if dtype is None:
        yield
        return
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.float32]
    weights = [layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        with torch.autocast(next(model.parameters()).device.type, dtype):
            yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


@contextmanager
def _visiting(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Have the model on `device` for as long as it is used: a third full model would crowd an accelerator.

    Its weights stay where they rest too, so that nothing needs to be copied back: nobody changes them there.
    """
    if device is None or device.type == "cpu":
        yield
        return
    at_rest = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    try:
        for tensor, data in at_rest:
            tensor.data = _copied_to(device, data)
        yield
    finally:
        for tensor, data in at_rest:
            tensor.data = data


def _copied_to(device: torch.device, data: torch.Tensor) -> torch.Tensor:
    return data.to(device, non_blocking=True)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def _frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()


def _trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _train_only(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _adapter_is_identity(state: dict[str, torch.Tensor]) -> bool:
    """A fresh LoRA adapter adds nothing: its B factors are zero."""
    factors = [tensor for name, tensor in state.items() if "lora_B" in name or "lora_embedding_B" in name]
    return bool(factors) and all(not tensor.any() for tensor in factors)
