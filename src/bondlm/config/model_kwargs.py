"""What of `model_init_kwargs` makes a model another one: an evaluation and a server need it again."""

from collections.abc import Mapping
from typing import Any

# Where and how weights lie, and who may read them. Quantised bases are evaluated unquantised (docs/quickstart.md).
_OF_ONE_MACHINE = {
    *("dtype", "torch_dtype", "quantization_config", "attn_implementation", "low_cpu_mem_usage", "token"),
    *("device_map", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict", "use_safetensors"),
}
_OF_A_SERVER = {"revision", "cache_dir", "local_files_only", "force_download", "proxies", "use_cache"}


def lasting_kwargs(model_init_kwargs: Any) -> dict[str, Any]:
    """Those that the model is loaded with wherever it is the run's reference, or an adapter's base."""
    given = model_init_kwargs if isinstance(model_init_kwargs, Mapping) else {}
    return {name: value for name, value in given.items() if name not in _OF_ONE_MACHINE and value is not None}


def unserved_kwargs(model_init_kwargs: Any) -> list[str]:
    """Names of those that change the model, and that a server has no option for; dropout does nothing there."""
    names = lasting_kwargs(model_init_kwargs).keys() - _OF_A_SERVER
    return sorted(name for name in names if "drop" not in name and "jitter" not in name)
