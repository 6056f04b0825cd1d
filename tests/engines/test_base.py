"""The seam between bondlm and its engines is what `Engine` says."""

import ast
from pathlib import Path

import bondlm
from bondlm.engines import Engine, RemoteEngine

SOURCE = Path(bondlm.__file__).parent
FILES = [path for path in SOURCE.rglob("*.py") if "engines" not in path.parts]


def asked_of_an_engine() -> set[str]:
    """Attributes of what is called `engine`, everywhere outside of the package."""
    return {
        node.attr
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "engine"
    } - {"checkpoint_engine"}  # of DeepSpeed's engine


def members(protocol: type) -> set[str]:
    names = set(vars(protocol)) | set(vars(protocol).get("__annotations__", {}))
    return {name for name in names if not name.startswith("_")}


def test_all_that_is_asked_of_an_engine_is_in_its_protocol_and_nothing_else() -> None:
    closed = {"close"}  # by contextlib.closing
    assert asked_of_an_engine() | closed == members(Engine) | members(RemoteEngine)
