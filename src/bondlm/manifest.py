"""Whole or absent: a checkpoint counts only if its manifest verifies.

The manifest is written last and lists every file with its size and SHA-256.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from bondlm.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 20


def seal(folder: Path) -> None:
    """Write the manifest of a checkpoint whose files are all there, after they have reached the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_FILE:
            files[path.relative_to(folder).as_posix()] = {
                "size": path.stat().st_size,
                "sha256": _digest(path, sync=True),
            }
    partial = folder / (MANIFEST_FILE + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST_FILE)
    _sync_folder(folder)


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None if every byte of it is as it was sealed."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["format"]
    except FileNotFoundError:
        return f"no {MANIFEST_FILE}: it was not finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    if version != FORMAT:
        return f"{MANIFEST_FILE} has format {version}, this bondlm reads {FORMAT}"
    if not isinstance(files, dict):
        return f"{MANIFEST_FILE} lists no files"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    extra = sorted(there - set(files) - {MANIFEST_FILE})
    if extra:
        return f"{extra[0]} is not in the manifest"
    return next((reason for name, entry in files.items() if (reason := _file_fault(folder, name, entry))), None)


def _file_fault(folder: Path, name: str, entry: Any) -> str | None:
    path = folder / name
    # A name must not lead out of the folder, by `..`, an absolute path or a link.
    if folder.resolve() not in path.resolve().parents or path.is_symlink():
        return f"{name!r} leads out of the folder"
    if not path.is_file():
        return f"{name} is missing"
    try:
        size, digest = int(entry["size"]), str(entry["sha256"])
    except (KeyError, TypeError, ValueError):
        return f"{name} has no size and hash in the manifest"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None if _digest(path) == digest else f"{name} is damaged (its hash differs)"


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run folder that verifies, and why newer ones were rejected.

    Raises:
        CheckpointError: there are checkpoints, but none that verifies. A run must never start afresh by accident.
    """
    found = [(_step(path), path) for path in folder.glob("checkpoint-*") if path.is_dir() and _step(path) >= 0]
    rejected: list[str] = []
    for _, path in sorted(found, reverse=True):
        reason = fault(path)
        if reason is None:
            return path, rejected
        rejected.append(f"{path}: {reason}")
    if rejected:
        raise CheckpointError(
            f"no checkpoint of {folder} can be trusted: {'; '.join(rejected)}. Choose another output_dir, or remove "
            "these to start afresh."
        )
    return None, rejected


def verify(folder: Path) -> None:
    """Raise CheckpointError unless the checkpoint is as it was sealed."""
    reason = fault(folder)
    if reason is not None:
        raise CheckpointError(f"{folder} cannot be resumed from: {reason}. Resume from an older checkpoint.")


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else -1


def _digest(path: Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
