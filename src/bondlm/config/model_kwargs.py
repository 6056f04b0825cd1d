"""Which `model_init_kwargs` change the model itself, so that evaluations and servers need them too."""

from collections.abc import Mapping
from typing import Any

# Where weights are placed, how they are stored, and access to them. Quantised bases are evaluated unquantised
# (docs/quickstart.md).
_OF_ONE_MACHINE = {
    *("dtype", "torch_dtype", "quantization_config", "attn_implementation", "low_cpu_mem_usage", "token"),
    *("device_map", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict", "use_safetensors"),
}
_OF_A_SERVER = {"revision", "cache_dir", "local_files_only", "force_download", "proxies", "use_cache"}


def lasting_kwargs(model_init_kwargs: Any) -> dict[str, Any]:
    """Those needed wherever the model is loaded as the run's reference or as an adapter's base."""
    given = model_init_kwargs if isinstance(model_init_kwargs, Mapping) else {}
    return {name: value for name, value in given.items() if name not in _OF_ONE_MACHINE and value is not None}


def unserved_kwargs(model_init_kwargs: Any) -> list[str]:
    """Names of those that change the model but for which a server has no option; dropout does nothing there."""
    names = lasting_kwargs(model_init_kwargs).keys() - _OF_A_SERVER
    return sorted(name for name in names if "drop" not in name and "jitter" not in name)
