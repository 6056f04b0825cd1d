"""The three roles that training needs: policy, anchor, reference.

With adapters the three roles share one set of base weights, and a role is a set of values for the trained weights. The
anchor's values, and the reference's if the adapter is not empty at the start, replace the policy's while they are used.
A fresh LoRA adapter adds nothing, so its reference is the base with the adapters off. With full fine-tuning the anchor
and the reference are frozen copies. Under FSDP2 and ZeRO-3 each process holds its part of all three roles, and for
sampling or scoring a role's weights are gathered in an unsharded twin (`bondlm.models.sharding`).
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from bondlm.errors import ConfigError
from bondlm.models.adapters import adds_nothing, save_adapter
from bondlm.models.precision import Fp32Head
from bondlm.models.probe import in_eval_mode
from bondlm.models.row_adapters import RowAdapters, can_join, joined
from bondlm.models.sharding import Replica, copied, gather_to_main, named_weights

Values = dict[int, Tensor]  # by the identity of the policy's parameter


class Roles:
    """The models of the three roles; `use(role)` lends one for sampling or scoring.

    `model` is what the trainer trains. `anchor_pairs` lists the pairs of anchor and policy parameters for an update.
    """

    def __init__(
        self, model: Any, *, sharded: bool = False, anchor_moves: bool = True, offload_anchor: bool = False
    ) -> None:
        """Create the anchor and the reference, both equal to the current policy.

        A model that will be `sharded` gets them in `on_sharded`; until then all three are the policy. With
        `offload_anchor` the anchor's full copy stays on the CPU between uses, as the reference's always does. An anchor
        that never moves and the reference share one copy.

        Raises:
            ConfigError: the model has no copy to offload.
        """
        self.model = model
        self.is_peft = isinstance(model, PeftModel)
        self._adapters_off = self.is_peft and adds_nothing(model)  # whether the base without adapters is the reference
        self._copies: dict[str, nn.Module] = {}
        self._values: dict[str, Values] = {}  # values of each role; it shares the other weights with the policy
        self.autocast: torch.dtype | None = None  # dtype of Trainer's mixed precision, in which all roles compute
        self._device: torch.device | None = None
        self._is_placed = not sharded  # whether anchor and reference exist
        if self.is_peft and not sharded:
            self._take_values()
        elif not sharded:
            anchor = _frozen_copy(model)
            self._copies = {"anchor": anchor, "reference": _frozen_copy(model) if anchor_moves else anchor}
        if offload_anchor and not self._copies:
            raise ConfigError(
                "offload_anchor=True: remove it. It is for full fine-tuning with a whole anchor per GPU; an adapter's "
                "anchor is small, and FSDP2 and ZeRO-3 shard it"
            )
        self._at_rest_on_cpu = {"anchor", "reference"} if offload_anchor else {"reference"} if anchor_moves else set()
        self._replica = Replica(model) if sharded else None

    @torch.no_grad()
    def on_sharded(self, dtype: torch.dtype | None) -> None:
        """Take this process's part of anchor and reference from the weights, just sharded and not yet trained.

        `dtype` is that of the forward pass in mixed precision, so that sampling computes as learning does.
        """
        if self._replica is None or self._is_placed:  # not sharded, or a second `train`
            return
        self._replica.dtype = dtype
        self._take_values()
        self._is_placed = True

    def _take_values(self) -> None:
        roles = ("anchor",) if self._adapters_off else ("anchor", "reference")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._values = {role: {id(p): copied(p) for p in trained} for role in roles}

    @property
    def core(self) -> Any:
        """The transformers model, without PEFT's wrapper around it (the adapters sit inside its layers)."""
        return self.model.get_base_model() if self.is_peft else self.model

    @property
    def adapter(self) -> PeftConfig | None:
        """The config of the policy's adapter."""
        return self.model.peft_config[self.model.active_adapter] if self.is_peft else None

    @property
    def adapter_roles(self) -> list[str]:
        """The roles that are adapters; a reference that is not among them is the base model."""
        return ["policy", "anchor", *([] if self._adapters_off else ["reference"])] if self.is_peft else []

    @property
    def anchor_pairs(self) -> list[tuple[str, Tensor, nn.Parameter]]:
        """(name, anchor weight, policy parameter) of all trained weights; empty until a model to shard is sharded."""
        if not self._is_placed:
            return []
        trained = {n: p for n, p in named_weights(self.model).items() if p.requires_grad}
        if self._copies:
            anchors = dict(self._copies["anchor"].named_parameters())
            return [(n, anchors[n], p) for n, p in trained.items()]
        return [(n, self._values["anchor"][id(p)], p) for n, p in trained.items()]

    def use_together(self, roles: Sequence[str]) -> AbstractContextManager[tuple[Any, RowAdapters]] | None:
        """Lend one model for several roles, with the adapter of each row; None if they do not share a model."""
        others = [self._values[role] for role in roles if role in self._values]
        # The policy comes first, because the model holds its values.
        if not self.is_peft or roles[0] != "policy" or len(others) < len(roles) - 1 or not can_join(self.model):
            return None
        return self._use_joined(others)

    @contextmanager
    def _use_joined(self, others: Sequence[Values]) -> Iterator[tuple[Any, RowAdapters]]:
        replica, weights = self._replica, named_weights(self.model, every_name=True)
        by_name = [_instead(weights, values) for values in others]
        with nullcontext(self.model) if replica is None else replica.holding(weights) as model:
            rows = RowAdapters(1 + len(others), next(model.parameters()).device)
            with (
                in_eval_mode(model.get_base_model()) as core,
                joined(model, by_name, rows),
                computing_in(core, self.autocast),
            ):
                yield core, rows

    @contextmanager
    def use(self, role: str) -> Iterator[Any]:
        """Lend the model of `role` in eval mode; afterwards, even on errors, the policy is active and trainable.

        If the model is sharded, every process must ask for the same roles in the same order.
        """
        if self._replica is not None:
            weights = _instead(named_weights(self.model, every_name=True), self._values.get(role, {}))
            with self._replica.holding(weights) as twin, self._adapters_of(twin, role):
                core = twin.get_base_model() if self.is_peft else twin
                # FSDP's forward pass casts weights, and so does the replica here; ZeRO-3 learns under autocast.
                with computing_in(core, self.autocast if self._replica.dtype is None else None):
                    yield core
            return
        if not self.is_peft:
            model = self.model if role == "policy" else self._copies[role]
            visits = role in self._at_rest_on_cpu
            with in_eval_mode(model), _visiting(model, self._device) if visits else nullcontext():
                with computing_in(model, self.autocast):
                    yield model
            return
        with (
            in_eval_mode(self.core) as core,
            _holding(self.model, self._values.get(role, {})),
            self._adapters_of(self.model, role),
            computing_in(core, self.autocast),
        ):
            yield core

    @contextmanager
    def _adapters_of(self, model: Any, role: str) -> Iterator[None]:
        """Switch the adapters on or off."""
        if not (self._adapters_off and role == "reference"):
            yield
            return
        # PEFT makes every weight of an adapter that it activates trainable, even those that the user has frozen (such
        # as LoRA's A).
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        try:
            with model.disable_adapter():
                yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trainable)

    def to(self, device: torch.device) -> None:
        """Move the anchor (the trainer moves the policy) unless it is kept on the CPU, as the reference's copy is."""
        self._device = device
        if "anchor" in self._copies and "anchor" not in self._at_rest_on_cpu:
            self._copies["anchor"].to(device)
        if self._replica is not None:
            self._replica.device = device
            return
        for parameter in self.model.parameters():  # one already on an accelerator stays: there may be several
            place = device if parameter.device.type == "cpu" else parameter.device
            for values in self._values.values():
                if id(parameter) in values:
                    values[id(parameter)] = values[id(parameter)].to(place)

    def keep_reference(self) -> None:
        """Give the reference its own copy if it shares the anchor's, which is about to get other weights."""
        if self._copies and self._copies["anchor"] is self._copies["reference"]:
            self._copies["reference"] = _frozen_copy(self._copies["anchor"]).to("cpu")
            self._at_rest_on_cpu.add("reference")

    def save(self, folder: str, *, is_main: bool) -> None:
        """Write the policy, or only its adapter, in the format of `from_pretrained`; a sharded one is gathered first.

        If it is sharded, every process must call this; only the main process writes and holds all weights.
        """
        model, state = self.model, None
        if self._replica is not None:
            weights = named_weights(model)
            if self.is_peft:
                ends = f".{model.active_adapter}"
                weights = {name: w for name, w in weights.items() if f"{ends}." in name or name.endswith(ends)}
            model, state = self._replica.plain, gather_to_main(weights, is_main=is_main)
        if is_main and self.is_peft:
            save_adapter(model, folder, state)
        elif is_main:
            model.save_pretrained(folder, state_dict=state)


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to `dtype`, with linear layers' weights cast once instead of at every call: same numbers, less work.

    Autocast caches a cast weight only if it is trained, and only within one call of the model, so decoding would cast
    all weights at every token.
    """
    if dtype is None:
        yield
        return
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, Fp32Head)]
    layers = [layer for layer in linear if layer.weight.dtype == torch.float32]
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
    """Put the model on `device` only while it is used, since a third full model would take too much accelerator memory.

    Its weights also stay at their usual place, where nothing changes them, so nothing needs to be copied back.
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


def _frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()


def _instead(weights: Mapping[str, Tensor], values: Values) -> dict[str, Tensor]:
    """Weights by name, with the role's own values where it has them."""
    return {name: values.get(id(weight), weight) for name, weight in weights.items()}


@contextmanager
def _holding(model: nn.Module, values: Values) -> Iterator[None]:
    """Put these values in place of the policy's, which are not changed."""
    at_rest = [(p, p.data) for p in model.parameters() if id(p) in values]
    try:
        for parameter, _ in at_rest:
            parameter.data = values[id(parameter)].to(parameter.device, parameter.dtype)
        torch.clear_autocast_cache()  # its keys are parameters, not values
        yield
    finally:
        for parameter, data in at_rest:
            parameter.data = data
        torch.clear_autocast_cache()
