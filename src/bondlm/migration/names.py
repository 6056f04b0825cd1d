"""Names that bondlm does not have are dropped if they ask for what happens anyway, and otherwise explained."""

import difflib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import InitVar
from typing import TYPE_CHECKING, Any, TypeAlias

from bondlm.errors import ConfigError
from bondlm.migration.tables import ARGUMENTS, COMMAND_LINE, SETTINGS, STAGES, Foreign

# Types of fields in the form that `HfArgumentParser` needs.
if TYPE_CHECKING:
    Keywords: TypeAlias = dict[str, Any] | None
    Texts: TypeAlias = str | list[str] | None
    NoOption: TypeAlias = str
else:
    Keywords = dict[str, Any] | str | None  # JSON on a command line, which TrainingArguments reads
    Texts = None | str | list[str]  # it uses the second as the type of the option
    NoOption = InitVar[str]  # TRL's ModelConfig has an option of that name, and a parser cannot have two


SHORT = {  # as people write them
    "lr": "learning_rate",
    **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
    **dict.fromkeys(("batch_size", "bs", "train_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("steps", "num_steps"), "max_steps"),
    **dict.fromkeys(("data", "train_file", "train_data"), "train_dataset"),
}
LONGEST_SHOWN = 200  # characters


class OwnNames(type):
    """Metaclass for dataclasses of settings and their subclasses: runs `own_names` before the constructor."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        """Build the object from the names that bondlm has."""
        fields: Mapping[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]  # perhaps a parent's
        constructor = inspect.signature(cls.__init__)  # type: ignore[misc]  # perhaps a subclass's own
        more = set(constructor.parameters) - {"self"}
        return super().__call__(*args, **own_names(settings, [*fields, *(more - fields.keys())]))


def own_names(given: Mapping[str, Any], known: Collection[str], *, command: str | None = None) -> dict[str, Any]:
    """The settings of a run that bondlm knows; foreign ones with a neutral value are left out.

    Args:
        given: settings by name, as the user wrote them.
        known: the names that bondlm has.
        command: the command whose options these are; None in Python.

    Raises:
        ConfigError: a foreign name has a value that bondlm does not support, or a name is unknown.
    """
    table, what, more = SETTINGS, "setting", ""
    if command is not None:
        table = STAGES if command in ("sft", "reward-model") else SETTINGS | COMMAND_LINE
        what, more = "option", f"; see `bondlm {command} --help`"
    return _own(given, known, table, what, more)


def own_arguments(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse arguments of a trainer's constructor that `BONDTrainer` does not have, unless they are None.

    Raises:
        ConfigError: one of them has a value.
    """
    _own(given, known, ARGUMENTS, "argument", "", spare=True)


def nearest(name: str, known: Collection[str]) -> str:
    """For a message: the known name that is meant by this one or most similar to it, if any is."""
    close = [SHORT[name]] if SHORT.get(name) in known else difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _own(
    given: Mapping[str, Any],
    known: Collection[str],
    table: Mapping[str, Foreign],
    what: str,
    more: str,
    *,
    spare: bool = False,
) -> dict[str, Any]:
    own, problems = {}, []
    for name, value in given.items():
        if name in known and not spare:
            own[name] = value
        elif name not in table:
            problems.append(f"unknown {what} {name!r}{nearest(name, known)}{more}")
        elif value is not None and value not in table[name].neutral:
            shown = repr(value)  # a model's fills pages
            shown = shown if len(shown) <= LONGEST_SHOWN else f"a {type(value).__name__}"
            problems.append(f"{name}={shown}: {table[name].text}")
    if problems:
        raise ConfigError("; ".join(problems))
    return own
