"""Names from TRL and older transformers: what each is called here, or why it does not exist."""

from bondlm.migration.names import Keywords, NoOption, OwnNames, Texts, own_arguments, own_names
from bondlm.migration.tables import ARGUMENTS, COMMAND_LINE, SETTINGS, STAGES, UNSAFE_CODE, Foreign

__all__ = [
    "ARGUMENTS",
    "COMMAND_LINE",
    "SETTINGS",
    "STAGES",
    "UNSAFE_CODE",
    "Foreign",
    "Keywords",
    "NoOption",
    "OwnNames",
    "Texts",
    "own_arguments",
    "own_names",
]
