"""Load a policy and check it before training."""

import copy
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME

from bondlm.config import BONDConfig
from bondlm.data.paths import located, refuse_absent_folder, refuse_own_folder, why_not_loaded
from bondlm.errors import ConfigError
from bondlm.models.adapters import (
    check_adapter,
    check_config,
    dropout_rates,
    fresh_adapter,
    silence_adapter,
)
from bondlm.models.precision import check_precision, settle_head, take_dtype, train_in_fp32
from bondlm.models.sharding import check_parallelism, shards_weights, uses_fsdp

# Errors that transformers, PEFT and safetensors raise for damaged or inconsistent files. RuntimeErrors are wrong
# shapes, LookupErrors are unknown names of parts (an activation, a kind of adapter).
_LOAD_ERRORS = (
    *(OSError, ValueError, TypeError, ImportError, RuntimeError, LookupError, AttributeError),
    *(SafetensorError, StrictDataclassError),
)

_log = logging.getLogger(__name__)


@contextmanager
def refused(say: Callable[[Exception], str]) -> Iterator[None]:
    """Turn errors of loading files into a ConfigError with the message from `say`; out of memory is not changed.

    Raises:
        ConfigError: they cannot be loaded.
    """
    try:
        yield
    except _LOAD_ERRORS as error:
        if isinstance(error, ConfigError) or should_reduce_batch_size(error):
            raise
        raise ConfigError(say(error)) from error


def load_model(path: str | Path, *, dtype: torch.dtype | str, **init_kwargs: Any) -> PreTrainedModel | PeftModel:
    """Load a causal or encoder-decoder model, or an adapter folder on its base model, by folder or hub name.

    Weights are read only from safetensors, and code that comes with a model is never run.

    Raises:
        ConfigError: there is no model that can be loaded, or some of its weights are missing.
    """
    if init_kwargs.pop("trust_remote_code", False):
        raise ConfigError(
            f"trust_remote_code would run code that comes with {str(path)!r}: bondlm does not. Load the model yourself "
            "and pass it to BONDTrainer"
        )
    refuse_absent_folder(str(path), "model")
    with refused(lambda error: f"cannot load the model {str(path)!r}: {why_not_loaded(str(path), error)}"):
        if (Path(path) / "adapter_config.json").is_file():
            return _load_adapter(Path(path), dtype, init_kwargs)
        return _load_whole(path, dtype, init_kwargs)


def _load_adapter(path: Path, dtype: torch.dtype | str, init_kwargs: dict[str, Any]) -> PeftModel:
    adapter = PeftConfig.from_pretrained(str(path))
    check_config(adapter, to_train=False)
    base = adapter.base_model_name_or_path
    if base is None:
        raise ConfigError(f"adapter {path!s}: adapter_config.json names no base model")
    if not (path / "adapter_model.safetensors").is_file():  # PEFT would load a pickle instead
        raise ConfigError(f"adapter {path!s}: no adapter_model.safetensors; save it as safetensors")
    of_base = {} if adapter.revision is None else {"revision": adapter.revision}
    model = load_model(base, dtype=dtype, **(of_base | init_kwargs))
    _resize_as(path, model)
    _end_as(path, model)
    advice = (
        "give the model that it was trained on (base_model_name_or_path in adapter_config.json), or save the adapter "
        "again"
    )
    unfit = f"the adapter {str(path)!r} does not fit its base {base!r}: "
    with refused(lambda error: f"{unfit}{' '.join(str(error).split())[:300]}; {advice}"):
        loaded = PeftModel.from_pretrained(model, str(path), is_trainable=True)
        info = loaded.load_adapter(str(path), loaded.active_adapter, is_trainable=True)  # again, for its report
    held = loaded.state_dict(keep_vars=True)
    found = {id(weight) for key, weight in held.items() if key not in info.missing_keys}
    missing = [key for key in info.missing_keys if id(held.get(key)) not in found]  # layers may share a weight
    if odd := [f"no {key}" for key in missing] or info.unexpected_keys:
        raise ConfigError(f"{unfit}its file has {_some(odd)}; {advice}")
    return loaded


def _load_whole(path: str | Path, dtype: torch.dtype | str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **init_kwargs)
    model, info = from_safetensors(_auto_class(config), path, dtype=dtype, **init_kwargs)
    refuse_missing(f"the model {str(path)!r}", model, info)
    return model  # type: ignore[no-any-return]


def from_safetensors(auto_class: Any, path: str | Path, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """A model, and the loading report of `from_pretrained` for `refuse_missing`; no pickle is read and no code run."""
    return auto_class.from_pretrained(  # type: ignore[no-any-return]
        path,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused by name, like missing ones
        **kwargs,
    )


def refuse_missing(what: str, model: Any, info: Mapping[str, Any], may_miss: str | None = None) -> None:
    """Refuse a checkpoint with missing weights or wrong shapes, which transformers would initialise at random.

    Args:
        what: the checkpoint. It may lack tables of sinusoids, which older versions of transformers left out.
        model: the loaded model.
        info: the report of `from_pretrained` with `output_loading_info`.
        may_miss: weights whose names contain this are not used.

    Raises:
        ConfigError: weights are missing or have wrong shapes.
    """
    computed = {f"{name}.weight" for name, module in model.named_modules() if "Sinusoidal" in type(module).__name__}
    missing = sorted(key for key in {*info["missing_keys"]} - computed if may_miss is None or may_miss not in key)
    shapes = [f"{key} (shape {tuple(a)}, not {tuple(b)})" for key, a, b in sorted(info["mismatched_keys"])]
    if not missing and not shapes:
        return
    others = sorted(info["unexpected_keys"])
    strays = f" (it has others that fit nowhere, such as {others[0]})" if others else ""
    raise ConfigError(
        f"{what} has no weights for {_some(missing + shapes)}{strays}: as a {type(model).__name__} they would be "
        "random numbers. Give a complete checkpoint of that class"
    )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def loaded_revision(model: Any, args: BONDConfig) -> str | None:
    """The revision of a hub model: the requested one, else the commit that it was loaded from."""
    asked = (args.model_init_kwargs or {}).get("revision")
    return asked or getattr(model.config, "_commit_hash", None)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """A model's own tokenizer, by the folder or hub name of the model; code that comes with it is never run.

    Raises:
        ConfigError: there is none, or the model has no name.
    """
    if not name:
        raise ConfigError("processing_class is missing: the model was not loaded by name, so give its tokenizer too")
    try:
        of_hub = {} if revision is None else {"revision": revision}
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **of_hub)
    except Exception as error:  # a damaged file raises a KeyError or a class of `tokenizers`
        files = [path.name for path in Path(name).iterdir()] if Path(name).is_dir() else []
        has_none = bool(files) and not any(re.match("tok|vocab|merges|sp|sentencep", file) for file in files)
        why = "the folder has none" if has_none else why_not_loaded(name, error)
        raise ConfigError(
            f"cannot load the tokenizer of the model {name!r}: {why}. Save one with the model, or pass it as "
            "processing_class"
        ) from error


def _resize_as(adapter: Path, model: Any) -> None:
    """Resize the base's vocabulary to that of training: PEFT saves a resized embedding with the adapter.

    Raises:
        ConfigError: the file has new rows of only one of embedding and head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {name: module for name, module in model.named_modules() if module is embedding or module is head}
    rows = {}
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for name, leaf in itertools.product(ends, ("weight", "base_layer.weight")):
            if (key := f"base_model.model.{name}.{leaf}") in file.keys():
                rows[name] = file.get_slice(key).get_shape()[0]
    if not rows or set(rows.values()) == {embedding.weight.shape[0]}:
        return
    is_tied = head is None or head.weight is embedding.weight
    if not is_tied and (lost := [name for name in ends if name not in rows]):
        (name, count), size = next(iter(rows.items())), embedding.weight.shape[0]
        raise ConfigError(
            f"the adapter {str(adapter)!r} does not fit its base: {count} rows of {name}, {size} in the base, and no "
            f"{lost[0]}. Give the base that it was trained on; if its vocabulary was resized before training, PEFT has "
            "dropped the new rows of the one that was not in target_modules: train with both the embedding and the "
            "head there, or with neither"
        )
    model.resize_token_embeddings(max(rows.values()), mean_resizing=False)  # its new rows are read next


def _end_as(adapter: Path, model: Any) -> None:
    """Let answers end where the adapter's folder says, as a whole model's do; its base may end elsewhere."""
    if (adapter / GENERATION_CONFIG_NAME).is_file():
        ends = GenerationConfig.from_pretrained(str(adapter)).eos_token_id
        model.generation_config.eos_token_id = model.generation_config.eos_token_id if ends is None else ends


def _auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class; some vision-language models have only the image-text one, although only their text is trained."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    sees = (
        config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and type(config) in AutoModelForImageTextToText._model_mapping
    )
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 if the hardware multiplies it natively, else fp32.

    On a CPU without AVX512-BF16 or AMX, bf16 products are emulated: measured 9 times slower than fp32 on AVX2.
    """
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        native = features.get("avx512_bf16", False) or features.get("amx_bf16", False)
        return torch.bfloat16 if native else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.float32


NOISE = re.compile(r"drop|jitter")  # names that modules give to the rates of dropout, layer drop and router noise


def disable_dropout(model: nn.Module) -> None:
    """Set all training noise to 0: a sample must be learned from with the log-probabilities that it was drawn with.

    Dropout is a module, or a number that a module has under one of many names. A probe finds what this misses
    (`bondlm.models.probe`).
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if NOISE.search(name) and isinstance(value, float):
                setattr(module, name, 0.0)
    _silence_configs(model)


def _silence_configs(model: nn.Module) -> None:
    """Give layers that read rates from their config one without noise; the saved config of the model is unchanged."""
    silent: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if not isinstance(config, PreTrainedConfig) or isinstance(module, PreTrainedModel):
            continue
        rates = [name for name, rate in vars(config).items() if NOISE.search(name) and isinstance(rate, float) and rate]
        if rates and id(config) not in silent:
            silent[id(config)] = copy.deepcopy(config)
            for name in rates:
                setattr(silent[id(config)], name, 0.0)
        if rates:
            vars(module)["config"] = silent[id(config)]


def prepare_policy(
    model: str | PreTrainedModel | PeftModel,
    args: BONDConfig,
    peft_config: PeftConfig | None,
    quantization_config: Any = None,
) -> PreTrainedModel | PeftModel:
    """The model to train: loaded if given by name, with a fresh adapter if one is requested, without dropout.

    Trained weights are fp32. `quantization_config` is for the base model of an adapter (QLoRA).

    Raises:
        ConfigError: it cannot be loaded, has nothing to train, or the settings contradict it.
    """
    check_parallelism(args)
    check_precision(args)
    given = {"model_init_kwargs": args.model_init_kwargs, "quantization_config": quantization_config}
    _check_arguments(args, peft_config)
    if isinstance(model, str):
        model = _load_policy(model, args, quantization_config, is_base=peft_config is not None)
    elif names := [name for name, value in given.items() if value]:
        raise ConfigError(f"{names[0]} is only for a model given by name: this one is loaded already")
    _check_as_loaded(model)
    if peft_config is None and not isinstance(model, PeftModel):
        _check_whole(model)
    if peft_config is not None:
        model = fresh_adapter(model, peft_config, sharded=shards_weights(args))
    if model.config.is_encoder_decoder:
        _check_encoder_decoder(model, args)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "the model has no trainable parameter: pass peft_config, load its adapter with is_trainable=True, or call "
            "requires_grad_(True) on what is to be trained"
        )
    for adapter in getattr(model, "peft_config", {}).values():  # saved with the adapter
        adapter.base_model_name_or_path = located(str(adapter.base_model_name_or_path or "")) or None
        adapter.revision = loaded_revision(model, args) or adapter.revision
        refuse_own_folder(str(adapter.base_model_name_or_path or ""), args.output_dir)
    train_in_fp32(model, autocast=args.bf16 or args.fp16)
    settle_head(model, args)
    check_adapter(model)
    if args.disable_dropout:
        disable_dropout(model)
        if isinstance(model, PeftModel):
            silence_adapter(model)
    return model


def _check_as_loaded(model: Any) -> None:
    """Refuse a model that is not whole, or not the model itself; drop a generation config that would fail when saved.

    Of that, nothing is lost but its tokens' ids, which are kept: a run draws without it, and saves its own.
    """
    if hasattr(model, "_orig_mod"):
        raise ConfigError("model: torch.compile has wrapped it: give the model itself, and set torch_compile=True")
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in places or (len(places) > 1 and "cpu" in places):
        raise ConfigError(
            "model: device_map or max_memory has put layers on the disk or the CPU, from where they cannot be trained: "
            "load it in a smaller dtype, quantised (QLoRA), or sharded over several GPUs (docs/scaling.md)"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            "model: transformers has loaded it from an adapter, which it put on its base. To go on with that adapter, "
            "give the name of its folder (from the hub: `hf download NAME --local-dir FOLDER`); for a new one on top, "
            "merge it (PeftModel.merge_and_unload), save the model and give that folder"
        )
    casts = (b.dtype for name, b in model.named_buffers() if "inv_freq" in name)
    if (cast := next((dtype for dtype in casts if dtype.itemsize < 4), None)) is not None:
        _log.warning(
            "the model was cast to %s after it was loaded, which has rounded its rotary frequencies; a saved model "
            "has exact ones. Load it with from_pretrained(..., dtype=...) instead",
            str(cast).removeprefix("torch."),
        )
    config = model.generation_config
    try:
        with TemporaryDirectory() as folder:  # transformers repairs one that was loaded, and refuses others
            copy.deepcopy(config).save_pretrained(folder)
    except ValueError:
        kept = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
        model.generation_config = GenerationConfig(**kept)


def _check_whole(model: Any) -> None:
    """Check that a whole model can be trained, and has its head when it is saved and loaded."""
    if getattr(model, "is_quantized", False):
        raise ConfigError("quantised weights cannot be trained: pass peft_config to train an adapter (QLoRA)")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    configs = model.config, model.config.get_text_config(decoder=True)
    ties = {getattr(config, "tie_word_embeddings", None) for config in configs}  # not all configs have the setting
    if head is not None and head.weight is embedding.weight and ties == {False}:
        raise ConfigError(
            "the model's head is its embedding, but its config has tie_word_embeddings=False: a saved model would "
            "have no head. Set model.config.tie_word_embeddings = True"
        )


def _check_encoder_decoder(model: Any, args: BONDConfig) -> None:
    """Refuse settings that an encoder-decoder model does not support."""
    if uses_fsdp(args):
        raise ConfigError(
            f"{model.config.model_type} under FSDP2: encoder and decoder share an embedding, which PyTorch and "
            "accelerate cannot shard in two groups; use DDP (examples/accelerate/ddp.yaml)"
        )
    if args.pad_to_multiple_of is not None:
        raise ConfigError(
            f"pad_to_multiple_of={args.pad_to_multiple_of}: the rows of an encoder-decoder model are padded to the "
            "longest; remove it"
        )


def _load_policy(
    name: str, args: BONDConfig, quantization_config: Any, *, is_base: bool
) -> PreTrainedModel | PeftModel:
    """Load the policy by name; with `is_base`, an adapter will be put on it."""
    init_kwargs = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in init_kwargs:
            raise ConfigError("quantization_config is given twice, in model_init_kwargs too: remove one of them")
        init_kwargs["quantization_config"] = quantization_config
    dtype = take_dtype(init_kwargs, setting=args.dtype)
    if dtype is None:
        dtype = _load_dtype(args, frozen=is_base or (Path(name) / "adapter_config.json").is_file())
    return load_model(name, dtype=dtype, **init_kwargs)


def _check_arguments(args: BONDConfig, peft_config: PeftConfig | None) -> None:
    """Check an adapter's config, and refuse noise that would have no effect, or act in learning but not in sampling."""
    if not isinstance(peft_config, PeftConfig | None):
        raise ConfigError(f"peft_config={peft_config!r}: give a config of peft, such as LoraConfig(r=16)")
    if args.neftune_noise_alpha is not None:
        raise ConfigError(
            f"neftune_noise_alpha={args.neftune_noise_alpha}: samples are drawn without noise, but what is learned "
            "from must have the log-probabilities that it was sampled with: remove it"
        )
    rates = {} if peft_config is None or not args.disable_dropout else dropout_rates(peft_config)
    for name, rate in rates.items():
        raise ConfigError(
            f"{name}={rate} of peft_config would do nothing, since disable_dropout=True turns all dropout off: set it "
            "to 0, or disable_dropout=False to train with noise"
        )


def _load_dtype(args: BONDConfig, *, frozen: bool) -> torch.dtype:
    """Trained weights are fp32 (in bf16, steps of 1e-6 would vanish); frozen ones may be bf16."""
    if not frozen:
        if args.dtype == "bfloat16":
            raise ConfigError("dtype=bfloat16 with full fine-tuning would lose small updates: use bf16=True (autocast)")
        return torch.float32
    return fast_dtype(args.device) if args.dtype == "auto" else getattr(torch, args.dtype)
