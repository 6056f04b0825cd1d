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
    """`value` with a leading `~` replaced by the home folder, also in lists; anything else is unchanged."""
    if isinstance(value, list):
        return [expanded(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def located(name: str) -> str:
    """The absolute path of an existing folder, so that it is found from everywhere; any other name is unchanged."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def as_seen_from(directory: Path, value: Any) -> Any:
    """Names of files, folders and rewards relative to `directory`; names that are not found there are unchanged."""
    return value if directory.resolve() == Path.cwd().resolve() else found_in(directory, value)


def found_in(directory: Path, value: Any) -> Any:
    """The same with absolute paths, also from the directory itself."""
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
    """Refuse a folder that does not exist, instead of asking the hub for an impossible name.

    Raises:
        ConfigError: `name` can only be a folder (or its parent folder exists), and there is none; or it is an address.
    """
    if "://" in name:
        raise ConfigError(f"{what} {name!r}: an address is neither a folder nor a name on the hub")
    path = Path(name)
    in_a_folder = name.count("/") == 1 and path.parent.is_dir()
    is_folder_name = name.startswith((".", "/")) or name.count("/") > 1 or in_a_folder
    if is_folder_name and not path.is_dir():
        raise ConfigError(f"{what} {name!r}: there is no folder {path.resolve()}")


def refuse_own_folder(model: str, output_dir: Any) -> None:
    """Check that a run does not overwrite the weights that it starts from, which are also the reference.

    Raises:
        ConfigError: the model is in the output folder.
    """
    if model and os.path.isdir(model) and os.path.realpath(model) == os.path.realpath(str(output_dir)):
        raise ConfigError(
            f"output_dir={str(output_dir)!r} is the folder of the model: the trained weights would replace it, and the "
            "reference with it. Choose another output_dir"
        )


def why_not_loaded(name: str, error: Exception) -> str:
    """Why a folder or hub name cannot be loaded; libraries blame the internet, or advise to run the model's code."""
    if isinstance(error, OSError) and not Path(name).exists():
        first = str(error).partition("\n")[0]
        return f"there is no file or folder of that name here, and the hub gives none: {first}"
    if "trust_remote_code" not in str(error):
        return str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
    return (
        "it comes with custom code, which trust_remote_code would run, but bondlm does not. Convert it to an "
        "architecture of transformers, or load it yourself and pass it to BONDTrainer"
    )
