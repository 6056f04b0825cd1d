"""Paths as users write them."""

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from bondlm.errors import ConfigError

_CRITERION = re.compile(r"(?<=[?&]prompt=)[^&]+")  # the file of a judge's criterion


def expanded(value: Any) -> Any:
    """With `~` at the beginning of a text replaced by the home folder, in lists too; anything else stays as it is."""
    if isinstance(value, list):
        return [expanded(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def located(name: str) -> str:
    """With the whole path of a folder that is there, so that it is found from everywhere; any other name as it is."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def as_seen_from(directory: Path, value: Any) -> Any:
    """Names of files, folders and rewards as they were meant in `directory`; what is not found there stays as it is."""
    return value if directory.resolve() == Path.cwd().resolve() else found_in(directory, value)


def found_in(directory: Path, value: Any) -> Any:
    """The same with whole paths, also from the directory itself."""
    if isinstance(value, list):
        return [found_in(directory, part) for part in value]
    if isinstance(value, Mapping):
        return {name: found_in(directory, part) for name, part in value.items()}
    if not isinstance(value, str) or not value:
        return value
    if (directory / value).exists() or glob.glob(str(directory / value)):
        return str(directory / value)
    ranks = "rank:" if value.startswith("rank:") else ""
    source, _, function = value.removeprefix(ranks).rpartition(":")
    if source.endswith(".py") and (directory / source).is_file():
        return f"{ranks}{directory / source}:{function}"
    if value.startswith("judge:"):
        return _CRITERION.sub(lambda found: quote(found_in(directory, unquote(found[0]))), value)
    kind, colon, rest = value.partition(":")
    for before, name, mark in ((kind + colon, rest, "?"), ("", value, "?"), ("", value, ":")):
        folder, mark, options = name.partition(mark)
        if folder and (directory / folder).is_dir():  # nli:FOLDER?options, FOLDER?options, FOLDER:CONFIG:SPLIT
            return f"{before}{directory / folder}{mark}{options}"
    return value


def refuse_absent_folder(name: str, what: str) -> None:
    """Say that a folder is not there, instead of asking the hub for a name that it cannot hold.

    Raises:
        ConfigError: `name` can only be a folder (or lies in one that exists), and there is none; or it is an address.
    """
    if "://" in name:
        raise ConfigError(f"{what} {name!r}: an address is neither a folder nor a name on the hub")
    path = Path(name)
    in_a_folder = name.count("/") == 1 and path.parent.is_dir()
    is_folder_name = name.startswith((".", "/")) or name.count("/") > 1 or in_a_folder
    if is_folder_name and not path.is_dir():
        raise ConfigError(f"{what} {name!r}: there is no folder {path.resolve()}")


def refuse_own_folder(model: str, output_dir: Any) -> None:
    """See that a run does not write its weights over those that it starts from: they are the reference, too.

    Raises:
        ConfigError: the model lies in the output folder.
    """
    if model and os.path.isdir(model) and os.path.realpath(model) == os.path.realpath(str(output_dir)):
        raise ConfigError(
            f"output_dir={str(output_dir)!r} is the folder of the model: the trained weights would replace it, and the "
            "reference with it. Choose another output_dir"
        )


def why_not_loaded(name: str, error: Exception) -> str:
    """Why a folder or a name of the hub is not loaded; libraries speak of the internet, or advise to run its code."""
    if isinstance(error, OSError) and not Path(name).exists():
        first = str(error).partition("\n")[0]
        return f"there is no file or folder of that name here, and the hub gives none: {first}"
    if "trust_remote_code" not in str(error):
        return str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
    return (
        "it comes with custom code, which trust_remote_code would run, and bondlm does not. Convert it to an "
        "architecture of transformers, or load it yourself and pass it to BONDTrainer"
    )
