"""Sample files of an evaluation: samples that were drawn and scored once are never drawn again.

A file has one JSON object per line, with the samples of a prompt together and prompts in the order of the data set.
`manifest.json`, in the same folder, states what the samples depend on; files made from anything else are refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bondlm.errors import ConfigError, DataError
from bondlm.runs.folder import write_whole

MANIFEST_FILE = "manifest.json"


def claim(folder: Path, fingerprint: Mapping[str, Any], files: Sequence[str], manifest: str = MANIFEST_FILE) -> None:
    """Write the manifest of a fresh folder, or check that the samples in it have this fingerprint.

    Raises:
        ConfigError: the folder holds samples of something else, of which the message names each difference, or another
            program's manifest.
    """
    path = folder / manifest
    present = [name for name in files if (folder / name).exists()]
    if not present:
        if path.exists() and not _is_fingerprint(path, fingerprint):
            raise ConfigError(f"{str(path)!r} was not written by an evaluation: choose another output folder")
        write_whole(path, json.dumps(fingerprint, indent=2) + "\n")
        return
    advice = f"choose another output folder, or remove {', '.join(present)} from {str(folder)!r} to draw them again"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(folder)!r} holds {present[0]} but no readable {manifest}, so it is unknown what it was drawn "
            f"from: {advice}"
        ) from error
    if not isinstance(before, dict):
        before = {}
    names = sorted(set(before) | set(fingerprint))
    changed = [
        f"{n}: {before.get(n)!r} -> {fingerprint.get(n)!r}"
        for n in names
        if _by_weights(before.get(n)) != _by_weights(fingerprint.get(n))
    ]
    if changed:
        raise ConfigError(f"{str(folder)!r} holds samples of another evaluation ({'; '.join(changed)}): {advice}")


def _is_fingerprint(path: Path, like: Mapping[str, Any]) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool(content.keys() & like.keys())


def _by_weights(value: Any) -> Any:
    """A model's fingerprint without its name if it has the hash of its weights: the folder may have been moved."""
    if isinstance(value, dict) and value.get("sha256"):
        return {key: item for key, item in value.items() if key != "name"}
    return value


def finished_prompts(path: Path, prompts: Sequence[Any], num_samples: int) -> int:
    """How many prompts have all their samples in the file; anything after them (a torn line, half a group) is cut off.

    Raises:
        DataError: a row belongs to another prompt, or the file has too many.
    """
    if not path.exists():
        return 0
    rows = 0
    kept = whole = 0
    for line in path.read_bytes().splitlines(keepends=True):  # bytes, since only line ends separate lines there
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
    """Rows of a file checked by `finished_prompts`, one at a time, since the file may be larger than memory.

    Raises:
        DataError: a line is not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: not a sample: the file was changed, remove it")
            yield row
