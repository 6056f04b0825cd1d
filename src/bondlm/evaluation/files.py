"""Sample files of an evaluation: what was drawn and scored once is never drawn again.

A file has one JSON object a line, the samples of a prompt together, prompts in the order of the data set. What they
depend on is kept beside them in `manifest.json`; files that were made from anything else are refused.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bondlm.errors import ConfigError, DataError

MANIFEST_FILE = "manifest.json"
WEIGHTS = ("*.safetensors", "config.json", "adapter_config.json")
_BLOCK = 1 << 20


def claim(folder: Path, fingerprint: Mapping[str, Any], files: Sequence[str], manifest: str = MANIFEST_FILE) -> None:
    """Write the manifest of a fresh folder, or check that the samples in it have this fingerprint.

    Raises:
        ConfigError: samples of something else are there, each difference is named.
    """
    path = folder / manifest
    present = [name for name in files if (folder / name).exists()]
    if not present:
        path.write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
        return
    advice = f"choose another output folder, or remove {', '.join(present)} from {str(folder)!r} to draw them again"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(folder)!r} holds {present[0]} but no readable {manifest}, so nobody knows what it was drawn "
            f"from: {advice}"
        ) from error
    if not isinstance(before, dict):
        before = {}
    names = sorted(set(before) | set(fingerprint))
    changed = [
        f"{n}: {before.get(n)!r} -> {fingerprint.get(n)!r}" for n in names if before.get(n) != fingerprint.get(n)
    ]
    if changed:
        raise ConfigError(f"{str(folder)!r} holds samples of another evaluation ({'; '.join(changed)}): {advice}")


def finished_prompts(path: Path, prompts: Sequence[Any], num_samples: int) -> int:
    """How many prompts the file has all samples of; what comes after them (a torn line, half a group) is cut off.

    Raises:
        DataError: a row belongs to another prompt, or the file has too many.
    """
    if not path.exists():
        return 0
    rows = 0
    kept = whole = 0
    for line in path.read_bytes().splitlines(keepends=True):  # bytes: only line ends are separators there
        if not line.endswith(b"\n"):
            break
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            break
        if rows // num_samples >= len(prompts) or prompt != prompts[rows // num_samples]:
            raise DataError(
                f"{path}:{rows + 1}: this sample is not of prompt {rows // num_samples} of the data set: the file was "
                "changed. Remove it to draw its samples again."
            )
        rows += 1
        kept += len(line)
        if rows % num_samples == 0:
            whole = kept
    if whole < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(whole)
    return rows // num_samples


def read_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file that `finished_prompts` has been through, one at a time: it may be larger than memory.

    Raises:
        DataError: a line is not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: not a sample: the file was changed, remove it")
            yield row


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


def reward_fingerprint(spec: Any) -> Any:
    """The reward as it was written, with a hash of the file or of the weights that it names."""
    text = str(spec)
    source = text.rpartition(":")[0]
    if source.endswith(".py") and Path(source).is_file():
        digest = hashlib.sha256()
        _add_file(digest, Path(source))
        return {"spec": text, "sha256": digest.hexdigest()}
    model = text.removeprefix("nli:").removeprefix("similarity:").removeprefix("classifier:").partition("?")[0]
    return {"spec": text} | ({"sha256": model_fingerprint(model, None)["sha256"]} if Path(model).is_dir() else {})


def rows_fingerprint(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Number and hash of the rows of a data set, all columns."""
    text = json.dumps(list(rows), sort_keys=True, default=str)
    return {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _add_file(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
