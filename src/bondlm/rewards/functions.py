"""Load a user's reward function by name."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bondlm.data.rows import kind_of
from bondlm.errors import ConfigError, as_list


def load_function(spec: str) -> Callable[..., Any]:
    """Load `"module:function"` or `"path/to/file.py:function"`.

    A file's path is relative to the working directory. Its functions share their state, until the file is edited: then
    it runs anew. A module is looked up as `import` does, so an edited one is not read again.

    Raises:
        ConfigError: the spec has another form, or the module or file cannot be loaded or has no such callable.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise ConfigError(
            f"reward {spec!r} is not 'module:function' or 'path/to/file.py:function': name the function after a colon."
        )
    module = _load_file(spec, Path(source)) if source.endswith(".py") else _load_module(spec, source)
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        found = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        what = "nothing" if function is None else kind_of(function)
        raise ConfigError(
            f"reward {spec!r}: {source!r} has {what} called {name!r}, but a reward must be callable. "
            f"It has these callables: {', '.join(found) or 'none'}."
        )
    return function


def _load_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        file = Path(f"{name.replace('.', '/')}.py")
        hint = f" The file {file} is here: did you mean '{file}:{spec.rpartition(':')[2]}'?" if file.is_file() else ""
        raise ConfigError(
            f"reward {spec!r}: importing the module {name!r} failed with {type(error).__name__}: {error}.{hint}"
        ) from error


def _load_file(spec: str, path: Path) -> ModuleType:
    resolved = path.resolve()
    if not resolved.is_file():
        raise ConfigError(
            f"reward {spec!r}{as_list(spec)}: there is no file {resolved}. Paths are relative to the working directory."
        )
    name = f"bondlm_user_{path.stem}_{abs(hash(resolved))}"
    try:
        loader = _CurrentSource(name, resolved)
    except OSError as error:
        raise ConfigError(f"reward {spec!r}: {resolved} cannot be read: {error.strerror}.") from error
    known = sys.modules.get(name)
    if known is not None and getattr(known.__loader__, "source", None) == loader.source:
        return known  # two functions of one file share its state, as with an import
    module_spec = importlib.util.spec_from_file_location(name, resolved, loader=loader)
    if module_spec is None:
        raise ConfigError(f"reward {spec!r}: Python cannot load {resolved} as a module.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look up a class's module there
    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"reward {spec!r}: running {resolved} failed with {type(error).__name__}: {error}."
        ) from error
    return module


class _CurrentSource(SourceFileLoader):
    """What the file holds now; Python's compiled files tell an edit only by its second and the file's size."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, str(path))
        self.source = path.read_bytes()

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.source, self.path)
