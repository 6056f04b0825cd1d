"""A checkpoint is valid only if its manifest verifies.

The manifest is written last and lists every file with its size and SHA-256.
"""

import hashlib
import json
import os
import shlex
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bondlm.errors import CheckpointError
from bondlm.runs.folder import CONFIG_FILE, METRICS_FILE, has_steps, write_whole
from bondlm.runs.prompting import PROMPTING_FILE

MANIFEST_FILE = "manifest.json"
SEALED_FILE = ".sealed"  # in the run folder: a checkpoint was completed here at some time
FORMAT = 1
_OTHER_FORMAT = f"{MANIFEST_FILE} has format"


def seal(folder: Path) -> None:
    """Write the manifest of a complete checkpoint, after its files have been synced to disk."""
    files = {}
    for path in sorted(_files(folder)):
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path, sync=True)}
    write_whole(folder / MANIFEST_FILE, json.dumps({"format": FORMAT, "files": files}, indent=1))
    for each in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync_folder(each)
    (folder.parent / SEALED_FILE).touch()
    _sync_folder(folder.parent)


def seal_changed(folder: Path) -> None:
    """Write the manifest anew if anything was added or replaced since, such as by a user's callback.

    What was removed, or moved away as a whole, stays a fault of the checkpoint.
    """
    manifest = folder / MANIFEST_FILE
    with suppress(FileNotFoundError):  # removed, perhaps at this moment
        sealed_at, known = manifest.stat().st_ctime_ns, json.loads(manifest.read_text(encoding="utf-8"))["files"].keys()
        # Unlike the time of modification, that of change is also new for a copy that keeps its times.
        now = {path.relative_to(folder).as_posix(): path.stat().st_ctime_ns for path in _files(folder)}
        changed = {name for name, time in now.items() if name not in known or time >= sealed_at}
        if changed and known <= now.keys():
            seal(folder)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE]


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted; None if every byte is unchanged since it was sealed."""
    if folder.is_symlink() or (folder / MANIFEST_FILE).is_symlink():
        return f"{folder.name} or its {MANIFEST_FILE} is a link"
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["format"]
    except FileNotFoundError:
        return f"no {MANIFEST_FILE}: it was not finished, or another program wrote it"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    if version != FORMAT:
        return f"{_OTHER_FORMAT} {version}, this bondlm reads {FORMAT}"
    if not isinstance(files, dict):
        return f"{MANIFEST_FILE} lists no files"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    extra = sorted(there - set(files) - {MANIFEST_FILE})
    if extra:
        return f"{extra[0]} is not in the manifest (another program's file can be removed)"
    return next((reason for name, entry in files.items() if (reason := _file_fault(folder, name, entry))), None)


def _file_fault(folder: Path, name: str, entry: Any) -> str | None:
    path = folder / name
    # A name must not leave the folder by `..`, an absolute path or a link.
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


def newest_checkpoint(folder: Path, *, but: Sequence[Path] = ()) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run folder that verifies, and why newer ones were rejected; `but` are ignored.

    Raises:
        CheckpointError: there are checkpoints but none verifies, or the newest has another format, or there were
            checkpoints and all are gone. A run must never restart by accident.
    """
    rejected: list[str] = []
    for path in reversed([path for path in _checkpoints(folder) if path not in but]):
        reason = fault(path)
        if reason is None:
            return path, rejected
        if reason.startswith(_OTHER_FORMAT):  # continuing from an older one would train its steps twice
            raise CheckpointError(f"{path}: {reason}. Continue with the bondlm that wrote it, or another output_dir.")
        rejected.append(f"{path}: {reason}")
    if rejected:
        raise CheckpointError(
            f"no checkpoint of {folder} can be trusted: {'; '.join(rejected)}. Choose another output_dir, or remove "
            "these to start afresh."
        )
    if (folder / SEALED_FILE).exists():
        raise CheckpointError(
            f"{folder} holds no checkpoint any more, though one was finished there ({SEALED_FILE}): restore it. To "
            f"start afresh choose another output_dir, or remove {folder / SEALED_FILE}"
        )
    return None, rejected


def was_a_run(folder: Path) -> bool:
    """Whether a run was begun there: PROMPTING_FILE is its first file, SEALED_FILE comes with a checkpoint."""
    return any((folder / sign).exists() for sign in (PROMPTING_FILE, SEALED_FILE))


def has_settings(folder: Path) -> bool:
    """Whether a run has gone as far as its first step there: an evaluation, too, leaves PROMPTING_FILE."""
    return (folder / SEALED_FILE).exists() or (was_a_run(folder) and (folder / CONFIG_FILE).exists())


def unfinished(folder: Path) -> list[Path]:
    """What an interrupted save of a run left behind; nothing in a folder where no run was begun.

    This means temporary folders, and checkpoints without a manifest that are newer than every sealed one (the run will
    write them again). If no save was ever completed, removing them loses nothing. If one was, and all manifests are
    gone, nothing is listed, and `newest_checkpoint` reports that no checkpoint can be trusted.
    """
    if not has_settings(folder):  # another trainer's checkpoints
        return []
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and not path.is_symlink()]
    sealed = [_step(path) for path in found if (path / MANIFEST_FILE).exists()]
    stale = [path for path in found if ".tmp" in path.name]
    if sealed or not (folder / SEALED_FILE).exists():
        newest = max(sealed, default=-1)
        stale += [path for path in found if _step(path) > newest and not (path / MANIFEST_FILE).exists()]
    return stale


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what an interrupted save left behind; returns one line for each."""
    stale = unfinished(folder)
    for path in stale:
        shutil.rmtree(path)
    return [f"removed {path}: its save was not finished" for path in stale]


def remove_older(folder: Path, *, keep: int, best: str | None = None, step: int | None = None) -> None:
    """Remove the oldest checkpoints beyond `keep`, except `best`. Those that cannot be removed are tried again later.

    Checkpoints beyond the current `step` do not count: a resume has skipped them because they are damaged.
    """
    found = [path for path in _checkpoints(folder) if step is None or _step(path) <= step]
    for path in found[: max(0, len(found) - keep)]:
        if best is not None and path.resolve() == Path(best).resolve():
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            warnings.warn(f"bondlm: {path} could not be removed ({error}): training continues", stacklevel=2)


def checkpoint_to_resume(folder: Path, wish: str | os.PathLike[str] | bool | None, *, taken: int = 0) -> str | None:
    """The checkpoint that `wish` names; for True the newest that verifies, and a warning says which newer ones do not.

    Raises:
        CheckpointError: it is missing or has changed since it was sealed; `folder` has steps that do not come from it;
            or no checkpoint is requested although the trainer has already `taken` steps.
    """
    wish = str(wish) if isinstance(wish, os.PathLike) else wish
    if not wish and taken:
        more = "train(resume_from_checkpoint=True) continues from the newest checkpoint; for a new run make"
        raise CheckpointError(
            f"this trainer has already trained {taken} steps: a second train() would count from step 0 again, from "
            f"their weights, and write over their logs in {str(folder)!r}. {more if _checkpoints(folder) else 'Make'} "
            "a new BONDTrainer with another output_dir"
        )
    if not isinstance(wish, bool) and wish is not None:
        verify(Path(wish))
        refuse_other_steps(folder, Path(wish))
    if not wish or isinstance(wish, str):
        return wish or None
    path, rejected = newest_checkpoint(folder)
    if path is None:
        raise CheckpointError(
            f"no checkpoint in {str(folder)!r}: start without resume_from_checkpoint, or name its folder"
        )
    for reason in rejected:
        warnings.warn(f"bondlm: not resumed from {reason}", stacklevel=3)
    return str(path)


def refuse_other_steps(folder: Path, checkpoint: Path) -> None:
    """Refuse to continue in `folder` from `checkpoint` if the folder has steps that do not come from it.

    A later resume would take newer checkpoints of the same folder, with weights of abandoned steps. Checkpoints and
    logs of another run would mix with the run's own. Newer checkpoints that do not verify do not matter, since every
    resume skips them.

    Raises:
        CheckpointError: there are such steps.
    """
    step = _step_of(checkpoint)
    if checkpoint.resolve().parent == folder.resolve():
        newer = [path for path in _checkpoints(folder, above=step) if _would_be_taken(path)]
        if newer:
            raise CheckpointError(
                f"{checkpoint} is not the newest checkpoint of its run: a later resume would take "
                f"{' or '.join(str(path) for path in newer)}, which have steps that this run leaves out. To go back to "
                f"step {step} remove them first (rm -r {shlex.join(map(str, newer))}), or choose another output_dir; "
                "resume: auto (in Python resume_from_checkpoint=True) continues from the newest"
            )
        return
    logs = folder / METRICS_FILE
    if _checkpoints(folder) or has_steps(logs, up_to=step):
        raise CheckpointError(
            f"output_dir={str(folder)!r} already holds another run than that of {checkpoint}: choose a new output_dir. "
            "resume: auto (in Python resume_from_checkpoint=True) continues the run that is there"
        )


def _checkpoints(folder: Path, *, above: int = -1) -> list[Path]:
    """The checkpoints of a run folder beyond step `above`, the oldest first."""
    found = [(_step(path), path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    return [path for step, path in sorted(found) if step > above]


def _would_be_taken(path: Path) -> bool:
    reason = fault(path)
    return reason is None or reason.startswith(_OTHER_FORMAT)


def _step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, for any name of its folder."""
    if (step := _step(checkpoint)) >= 0:
        return step
    path = checkpoint / "trainer_state.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say how many steps were taken ({error}): resume from another checkpoint"
        ) from error


def verify(folder: Path) -> None:
    """Raise CheckpointError if the checkpoint has changed since it was sealed."""
    reason = fault(folder)
    if reason is not None:
        raise CheckpointError(f"{folder} cannot be resumed from: {reason}. Resume from an older checkpoint.")


def _step(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() else -1


def _digest(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
