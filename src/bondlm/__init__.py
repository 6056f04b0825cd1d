"""bondlm: Best-of-N Distillation (BOND, J-BOND) for language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bondlm.config import BONDConfig
    from bondlm.trainer import BONDTrainer

__version__ = "0.2.0.dev0"
__all__ = ["BONDConfig", "BONDTrainer", "__version__"]

_HOMES = {"BONDConfig": "bondlm.config", "BONDTrainer": "bondlm.trainer"}


def __getattr__(name: str) -> Any:
    """Import the heavy names on first use, so that `import bondlm` and `bondlm --help` stay fast."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bondlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names of the module, including those imported on first use."""
    return sorted({*globals(), *__all__})
