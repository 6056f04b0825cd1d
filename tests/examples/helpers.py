"""Examples as modules: they are files to run, in no package."""

from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str, *changes: tuple[str, str]) -> ModuleType:
    """The example `name` as a module, each (old, new) of `changes` made in its text first."""
    path = EXAMPLES / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
        text = text.replace(old, new)
    module = ModuleType(path.stem)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module
