"""Load reward models safely: no remote code, safetensors only, and never an untrained head."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bondlm.data.paths import refuse_absent_folder, why_not_loaded
from bondlm.errors import ConfigError
from bondlm.models.load import from_safetensors, refuse_missing, refused


def frozen(model: nn.Module) -> Any:
    """Put a model in eval mode (no dropout), stop its gradients, and let its last layer compute in fp32.

    Raises:
        ConfigError: it is not a transformers model.
    """
    if not hasattr(model, "config"):
        raise ConfigError(f"{type(model).__name__} has no config: a reward that is a module is a transformers model.")
    return with_fp32_head(model.eval().requires_grad_(False))


def with_fp32_head(model: Any) -> Any:
    """Let the last layer compute in fp32: rewards are compared, and bf16 has only 32 values between 4 and 8.

    A head that shares its weights with the embedding gets its own copy. The head is the last linear layer outside the
    base model, since its name differs between model families.
    """
    inside = set(model.base_model.modules())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside]
    for last in {id(head): head for head in (model.get_output_embeddings(), *linear[-1:])}.values():
        if not isinstance(last, nn.Linear) or last.weight.dtype not in (torch.bfloat16, torch.float16):
            continue
        for name, parameter in list(last.named_parameters(recurse=False)):
            setattr(last, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
        last.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    return model


def load_config(path: str) -> Any:
    """Read a model's configuration.

    Raises:
        ConfigError: there is no such model, it needs remote code, or it is a PEFT adapter.
    """
    from transformers import AutoConfig

    refuse_absent_folder(path, "reward model")
    if (Path(path) / "adapter_config.json").is_file():
        raise _adapter_error(path)
    with _refused(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def load_tokenizer(path: str) -> Any:
    """Read a model's own tokenizer.

    Raises:
        ConfigError: there is none, or it needs remote code.
    """
    from transformers import AutoTokenizer

    with _refused(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_model(
    auto_class: Any, path: str, *, device: torch.device | str, dtype: torch.dtype | str, may_miss: str | None = None
) -> Any:
    """Load a model and refuse it if any of its weights is not in the checkpoint, or its own class has a larger head.

    transformers only warns about missing weights and initialises them at random, and a reward model with a random head
    is noise. It also drops weights that its class does not have.

    Args:
        auto_class: a transformers Auto class.
        path: folder or hub id.
        device: where the model goes.
        dtype: its dtype, or "auto" for that of the checkpoint.
        may_miss: weights whose name contains this are not used and may be missing.

    Returns:
        The model on its device.

    Raises:
        ConfigError: the model cannot be loaded, weights are missing, or some would be dropped of a model with code of
            its own.
    """
    refuse_absent_folder(path, "reward model")
    with _refused(path):
        model, info = from_safetensors(auto_class, path, dtype=dtype)
    if getattr(model, "peft_config", None) is not None:
        raise _adapter_error(path)  # the loading info is then that of the adapter and does not cover the head
    refuse_missing(f"reward model {path!r}", model, info, may_miss)
    _refuse_dropped(path, model, info["unexpected_keys"])
    return model.to(device)


def _refuse_dropped(path: str, model: Any, dropped: Iterable[str]) -> None:
    """Refuse a model of a class that transformers does not have, if weights of it fit nowhere (but for an LM head)."""
    import transformers

    own = [name for name in model.config.architectures or () if not hasattr(transformers, name)]
    lost = sorted(key for key in dropped if not key.startswith("lm_head."))
    if own and lost:
        raise ConfigError(
            f"reward model {path!r} is a {own[0]}, whose weight {lost[0]} has no place in a "
            f"{type(model).__name__}: its rewards would be different (code from the hub is never run). Score with it "
            "in a function or a server of your own."
        )


def _refused(path: str) -> AbstractContextManager[None]:
    return refused(
        lambda error: (
            f"reward model {path!r} cannot be loaded: {why_not_loaded(path, error)} (a reward model is a folder or hub "
            "id with safetensors weights and a tokenizer; code from the hub is never run)."
        )
    )


def _adapter_error(path: str) -> ConfigError:
    return ConfigError(
        f"reward model {path!r} is a PEFT adapter: merge it into its base (merge_and_unload), save that, and give the "
        "saved folder."
    )
