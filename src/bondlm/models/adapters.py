"""Adapters of any kind (PEFT): checks that they can be trained exactly; attaching, comparing and saving them."""

import copy
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from bondlm.errors import ConfigError, as_list
from bondlm.models.probe import difference, in_eval_mode, is_low_precision, plain_logits, probe_groups, tolerance_of
from bondlm.models.row_adapters import can_join
from bondlm.models.sharding import whole

_LOGGER = logging.getLogger(__name__)
IN, OUT = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")  # LoRA's factors; a fresh one has OUT = 0
REPEATED = ("pissa", "olora")  # initialised from the base, in the same way each time the adapter is loaded
LOST = ("pissa_niter", "loftq", "corda", "lora_ga")  # initialised from chance, data or a quantiser


# -- refusals


def require_trainable(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Check that a user's optimizer has all trainable weights: one made before the adapter has those of the base.

    Raises:
        ConfigError: some weights are in none of its groups, and would never change.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    if names:
        raise ConfigError(
            f"optimizers: {len(names)} trainable weights are not in the optimizer and would stay as they are, first "
            f"{names[0]}. Make it of the model as it is trained (with peft_config: get_peft_model first, and pass that "
            "model), or set requires_grad to False for what is to stay"
        )


def check_config(config: PeftConfig, *, to_train: bool = True) -> None:
    """Refuse kinds of adapters, named in the message, that cannot be computed, trained or reloaded exactly.

    Raises:
        ConfigError: it is such a kind.
    """
    kind, start = _kind(config), _initialisation(config)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ConfigError(f"{kind} puts learned tokens before the prompt; bondlm does not support that, use LoraConfig")
    if kind in ("XLORA", "POLY", "SHADOW"):
        raise ConfigError(f"{kind} needs inputs besides text, which bondlm does not support: use LoraConfig")
    if getattr(config, "alora_invocation_tokens", None) is not None:
        raise ConfigError("alora_invocation_tokens: an adapter that begins in the middle of a text cannot be used")
    if start.startswith(LOST):
        raise ConfigError(
            f"init_lora_weights={start!r} changes the base's weights in a way that cannot be repeated, so the saved "
            "adapter would fit no base: use 'pissa', 'olora' or 'eva', or save the base that it leaves, load it, and "
            "put the adapter on that with init_lora_weights=True"
        )
    if to_train and kind == "ADALORA":
        raise ConfigError(
            "AdaLoRA must be called with its gradients in every step, which bondlm does not: use LoraConfig"
        )
    bias: str = getattr(config, "bias", "none")
    if to_train and bias != "none":
        raise ConfigError(
            f"bias={bias!r} trains biases of the base, which the reference shares: use bias='none', or name the "
            "layers in modules_to_save"
        )


def check_adapter(model: Any) -> None:
    """Refuse a model that trains more than its adapter, or whose forward pass does not use the adapter.

    Raises:
        ConfigError: see above.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if not isinstance(model, PeftModel):
        if layers:
            raise ConfigError(
                "the model has adapter layers inside: pass the PeftModel that get_peft_model returned, or the base "
                "model with peft_config"
            )
        return
    if len(model.active_adapters) != 1:
        raise ConfigError(f"active adapters {model.active_adapters}: activate only the one to train (set_adapter)")
    check_config(model.peft_config[model.active_adapter])
    if any(layer.merged or layer.disable_adapters for layer in layers):
        raise ConfigError("the adapter is merged or disabled: call unmerge_adapter() or enable_adapter_layers() before")
    saved = {id(weight) for weight in adapter_weights(model).values()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if outside:
        raise ConfigError(
            f"{len(outside)} weights train outside of the adapter {model.active_adapter!r} (first: {outside[0]}), and "
            "its folder would not hold them: freeze them, or name their modules in modules_to_save"
        )


def _kind(config: PeftConfig) -> str:
    return str(config.peft_type).rsplit(".", 1)[-1]


def _initialisation(config: PeftConfig) -> str:
    return str(getattr(config, "init_lora_weights", None)).lower()


def plain_lora(config: Any, rank: int) -> Any:
    """The LoRA config of one rank and scaling 1 in every layer: the factors hold the whole product."""
    made = copy.deepcopy(config)
    made.r = made.lora_alpha = rank
    made.rank_pattern, made.alpha_pattern, made.use_rslora, made.init_lora_weights = {}, {}, False, True
    made.inference_mode = True
    return made


def change_of_base(config: PeftConfig) -> str:
    """The setting with which attaching the adapter changes the base; empty if there is none."""
    if getattr(config, "layer_replication", None):
        return "layer_replication"
    start = _initialisation(config)
    return f"init_lora_weights={start!r}" if start.startswith((*REPEATED, *LOST)) else ""


# -- putting on


def wrap_adapter(model: Any, peft_config: PeftConfig) -> PeftModel:
    """Put a fresh adapter on `model`, with weights in fp32 for any dtype of the base.

    Raises:
        ConfigError: PEFT refuses it.
    """
    try:
        # A copy, because PEFT writes the layers that "all-linear" means into it.
        return get_peft_model(model, copy.deepcopy(peft_config), autocast_adapter_dtype=True)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        hint = as_list(getattr(peft_config, "target_modules", None))  # prompt tuning has none
        raise ConfigError(f"peft_config: PEFT refuses this {_kind(peft_config)}: {error}{hint}") from error


def fresh_adapter(model: Any, peft_config: PeftConfig, *, sharded: bool) -> PeftModel:
    """`wrap_adapter` for a policy: the fresh adapter must not change the model's outputs.

    Raises:
        ConfigError: the adapter changes the model, or this kind of adapter cannot be trained.
    """
    if isinstance(model, PeftModel):
        raise ConfigError(
            "peft_config was given, but the model has an adapter already. To go on with that adapter, give its folder "
            "as model, without peft_config; to put a new one on it, merge it (PeftModel.merge_and_unload), save the "
            "model and give that folder"
        )
    check_config(peft_config)
    remove_adapters(model)
    change = change_of_base(peft_config)
    if sharded and change:
        raise ConfigError(f"{change} changes weights that are sharded here: remove it, or train on one process")
    given = _logits(model) if change else None
    if peft_config.task_type is not None:  # by which PEFT chooses the class that loads the adapter
        peft_config.task_type = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    wrapped = wrap_adapter(model, peft_config)
    if sharded or (given is None and adds_nothing(wrapped)):
        return wrapped
    if given is None:
        with wrapped.disable_adapter():
            given = _logits(wrapped)
    is_low = is_low_precision(wrapped)
    apart = difference(_logits(wrapped), given, is_low=is_low)
    if apart > tolerance_of(given, is_low=is_low):
        raise ConfigError(
            f"peft_config: with this {_kind(peft_config)} adapter the model starts {apart:.2g} nats per token away "
            "from the given one. Choose an initialisation that starts there (init_weights=True of most kinds), or pass "
            "the PEFT model itself: it is then the given one"
        )
    return wrapped


def _logits(model: Any) -> list[Tensor]:
    with in_eval_mode(model):
        return plain_logits(model, probe_groups(model), model.device)


def remove_adapters(model: nn.Module) -> None:
    """Remove what an earlier `get_peft_model` has put into this model: a notebook cell may be run twice.

    Raises:
        ConfigError: the earlier adapter has changed the base.
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        if change := change_of_base(config):
            raise ConfigError(f"an earlier adapter, with {change}, has changed this model: load the model again")
    done: list[str] = []
    for name, module in list(model.named_modules()):
        is_layer, is_wrapper = isinstance(module, BaseTunerLayer), isinstance(module, AuxiliaryTrainingWrapper)
        if not (is_layer or is_wrapper) or any(name.startswith(f"{outer}.") for outer in done):
            continue
        if is_layer and module.merged:
            module.unmerge()
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module.get_base_layer() if is_layer else module.original_module)
        done.append(name)
    if done and hasattr(model, "peft_config"):
        del model.peft_config
    if done:
        _LOGGER.warning(
            "removed the adapter that an earlier get_peft_model had put on the model: training starts without it"
        )


def silence_adapter(model: PeftModel) -> None:
    """Set the adapter's dropout to 0, also in its config, which is saved: it must learn as it samples."""
    config: Any = model.peft_config[model.active_adapter]
    rates = dropout_rates(config)
    for name in rates:
        setattr(config, name, 0.0)
    for module in model.modules():
        by_adapter = getattr(module, "module_dropout", None)
        if isinstance(by_adapter, dict):
            by_adapter.update(dict.fromkeys(by_adapter, 0.0))
        if "Dropout" in type(module).__name__ and isinstance(vars(module).get("p"), float):
            vars(module)["p"] = 0.0
    if rates:
        said = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        _LOGGER.warning(f"the adapter's {said} is 0 in this run: disable_dropout=True (disable_dropout=False keeps it)")


def dropout_rates(config: PeftConfig) -> dict[str, float]:
    """The noise rates in an adapter's config."""
    return {n: v for n, v in vars(config).items() if "dropout" in n and isinstance(v, float | int) and v > 0}


# -- looking at


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    """Parameters and buffers of the active adapter's folder, by their names in it."""
    every = model.state_dict(keep_vars=True)
    return get_peft_model_state_dict(  # type: ignore[no-any-return]
        model, state_dict=every, adapter_name=model.active_adapter, save_embedding_layers=False
    )


def adds_nothing(model: PeftModel) -> bool:
    """Whether the model is the same with its adapters off; for LoRA, if B = 0 in every layer."""
    fully_trained = set()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            mine = module.modules_to_save[model.active_adapter]
            pairs = zip(mine.parameters(), module.original_module.parameters(), strict=True)
            if not all(torch.equal(whole(a), whole(b).to(a.dtype)) for a, b in pairs):
                return False
            fully_trained |= {id(p) for p in mine.parameters()}
    rest = {name: weight for name, weight in adapter_weights(model).items() if id(weight) not in fully_trained}
    if not all(_is_any(name, IN + OUT) for name in rest):
        return False
    return not any(weight.any() for name, weight in rest.items() if _is_any(name, OUT))


def _is_any(name: str, parts: tuple[str, ...]) -> bool:
    return any(f".{part}" in name for part in parts)


def without_wrapper(model: PeftModel) -> Any:
    """The transformers model with the adapter inside, to sample from.

    In fp32, LoRA on linear layers is merged, which decodes faster. In bf16 the sum would be rounded, which changes the
    distribution by tenths of a nat per text. In that case, and for other kinds of adapters, the adapter stays separate.
    """
    is_fp32 = all(p.dtype == torch.float32 for p in model.parameters())
    return model.merge_and_unload() if is_fp32 and can_join(model) and not _is_shared(model) else model.get_base_model()


def _is_shared(model: PeftModel) -> bool:
    """Whether a weight that an adapter adds to is used elsewhere too, as a tied head is: it would change there."""
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return any(uses[id(layer.get_base_layer().weight)] > 1 for layer in layers)


def edits_base(model: PeftModel) -> bool:
    """Whether the base in memory differs from the base on file."""
    return bool(change_of_base(model.peft_config[model.active_adapter]))


def check_start(model: PeftModel, use: Callable[[str], AbstractContextManager[Any]], *, sharded: bool) -> None:
    """Check that before step 1 the model that learns, the one that samples, the anchor and the reference are the same.

    Raises:
        ConfigError: they are not.
    """
    with use("policy") as core:
        is_low = is_low_precision(core)
        groups = probe_groups(core)
        policy = plain_logits(core, groups, core.device)
        seen = {} if sharded else {"the policy as it learns": plain_logits(model, groups, core.device)}
    for role in ("anchor", "reference"):
        with use(role) as core:
            seen[f"the {role}"] = plain_logits(core, groups, core.device)
    for name, logits in seen.items():
        apart = difference(logits, policy, is_low=is_low)
        if apart > tolerance_of(policy, is_low=is_low):
            kind = _kind(model.peft_config[model.active_adapter])
            raise ConfigError(
                f"{kind}: before the first step {name} is {apart:.2g} nats per token away from the policy as it "
                "samples. bondlm cannot train this kind of adapter: use LoraConfig"
            )


# -- saving


def save_adapter(model: PeftModel, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the active adapter, whatever its name, into `folder` itself; `state` holds weights that are elsewhere."""
    name, card = model.active_adapter, Path(folder) / "README.md"
    had_card = card.exists()
    model.save_pretrained(str(folder), selected_adapters=[name], state_dict=state)
    if not had_card:  # PEFT's card is an empty form
        card.unlink(missing_ok=True)
    if name != "default":  # PEFT puts these into a subfolder
        for path in (Path(folder) / name).iterdir():
            path.replace(Path(folder) / path.name)
        (Path(folder) / name).rmdir()
