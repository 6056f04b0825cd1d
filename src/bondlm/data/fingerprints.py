"""Fingerprints of the sources of sample files: names, and hashes of their files."""

import hashlib
import inspect
import json
import re
import tokenize
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from bondlm.data.columns import PROMPT_IDS
from bondlm.data.paths import expanded
from bondlm.runs.redact import redact

WEIGHTS = ("*.safetensors", "config.json", "adapter_config.json")
NOT_THE_USERS = ("bondlm", "transformers", "peft", "torch", "builtins")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of an object in memory: another one each time that a row is read


def model_fingerprint(name: str, revision: str | None) -> dict[str, Any]:
    """Path and hash of a model folder's weights; the revision of a hub model."""
    folder = Path(name)
    if not folder.is_dir():
        return {"name": name, "revision": revision}
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        _add_file(digest, path)
    return {"name": str(folder), "sha256": digest.hexdigest()}


def weights_digest(folder: Path) -> str:
    """Hash of only a model folder's weights, for any file names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        _add_file(digest, path)
    return digest.hexdigest()


def reward_fingerprint(spec: Any) -> Any:
    """The reward's spec without secrets, with a hash of the file or weights it names, or of a function's source."""
    if not isinstance(spec, str):
        return _source_fingerprint(spec)
    text, written = spec, {"spec": redact(spec, is_name=True)}
    if (file := _source_file(expanded(text.removeprefix("rank:").rpartition(":")[0]))) is not None:
        return written | {"sha256": _hash_of(file)}
    if text.startswith("judge:"):
        prompt = dict(part.partition("=")[::2] for part in text.partition("?")[2].split("&")).get("prompt")
        criterion = None if prompt is None else Path(unquote(prompt)).expanduser()
        return written | ({"sha256": _hash_of(criterion)} if criterion and criterion.is_file() else {})
    name = text.removeprefix("nli:").removeprefix("similarity:").removeprefix("classifier:").partition("?")[0]
    model = expanded(name)
    return written | ({"sha256": model_fingerprint(model, None)["sha256"]} if Path(model).is_dir() else {})


def _source_fingerprint(reward: Any) -> dict[str, Any]:
    """The name of a user's function or class, with a hash of its source.

    A lambda has no hash, since its source is the whole line; nor has what is not the user's, such as a model.
    """
    reward = reward.func if isinstance(reward, partial) else reward
    reward = getattr(reward, "asked", (reward,))[0] if getattr(reward, "ranks", False) is True else reward
    code = reward if inspect.isroutine(reward) else type(reward)
    fingerprint = {"spec": f"{code.__module__}.{code.__qualname__}"}
    if code.__name__ == "<lambda>" or str(code.__module__).partition(".")[0] in NOT_THE_USERS:
        return fingerprint
    try:
        return fingerprint | {"sha256": hashlib.sha256(inspect.getsource(code).encode()).hexdigest()}
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # from a console, or edited since its import
        return fingerprint


def _source_file(source: str) -> Path | None:
    """The file of `path/to/file.py` or of a module; None if it is neither."""
    if source.endswith(".py"):
        return Path(source) if Path(source).is_file() else None
    if not all(part.isidentifier() for part in source.split(".")):
        return None
    try:
        found = find_spec(source)
    except (ImportError, ValueError, AttributeError):
        return None
    file = None if found is None or found.origin is None else Path(found.origin)
    return file if file is not None and file.is_file() else None


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same weights: by hash if both have one, otherwise by name."""
    key = "sha256" if "sha256" in one and "sha256" in other else "name"
    return bool(one.get(key) == other.get(key))


def rows_fingerprint(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Number and hash of the rows of a data set, all columns."""
    text = rows_text(list(rows))
    return {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def data_digest(dataset: Any) -> dict[str, Any]:
    """Number and hashes of all rows of an encoded data set: of their columns, and of the prompts as tokens."""
    text, tokens = hashlib.sha256(), hashlib.sha256()
    for batch in dataset.iter(1000):
        tokens.update(json.dumps(batch.pop(PROMPT_IDS, None)).encode())
        text.update(rows_text(batch).encode())
    return {"rows": len(dataset), "text": text.hexdigest(), "tokens": tokens.hexdigest()}


def rows_text(rows: Any) -> str:
    """Rows as JSON that is the same whenever they are read, also with images and arrays in them."""
    return json.dumps(rows, sort_keys=True, default=_always_the_same)


def _always_the_same(value: Any) -> Any:
    if callable(getattr(value, "tobytes", None)):  # an image or an array, whose text lacks its content
        kind = [str(getattr(value, name, None)) for name in ("mode", "size", "dtype", "shape")]
        return [*kind, hashlib.sha256(value.tobytes()).hexdigest()]
    return _ADDRESS.sub("", str(value))


def _hash_of(file: Path) -> str:
    digest = hashlib.sha256()
    _add_file(digest, file)
    return digest.hexdigest()


def _add_file(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, lambda: digest)  # updates it
