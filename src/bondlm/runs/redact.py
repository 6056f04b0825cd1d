"""Keep secrets out of files and messages: text that looks like a secret is replaced before it is written.

Control characters are written as escapes, so that they do not reach a terminal or a page.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

HIDDEN = "<secret>"
_NAMES = r"(?:[a-z0-9]+[_-])*(?:token|secret|password|passwd|api[_-]?key|access[_-]?key|authorization)"
_PATTERNS = (
    (re.compile(r"(:/{1,2})[^/\s@]+(?=@)"), rf"\g<1>{HIDDEN}"),  # user and password in an address; a path has one slash
    (re.compile(rf"(?i)([?&;]{_NAMES}=)[^&\s#'\";]+"), rf"\g<1>{HIDDEN}"),
    (re.compile(rf"(?i)(--{_NAMES}['\"]?[\s,=]+['\"]?)[^\s'\",\]]+"), rf"\g<1>{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[a-z0-9._~+/=-]{8,}"), rf"\g<1>\g<2>{HIDDEN}"),
)
_KEY = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|xoxb-)[A-Za-z0-9_-]{16,}")
# A part of a name; each kind of key has a longer part, of letters and digits.
_WORD = re.compile(r"[A-Za-z]{0,16}|[A-Za-z0-9]{1,8}|[0-9]{1,14}")
# Settings that name models, data, files and folders, such as sk-mistral-7b-instruct-v2.
_NAMING = {"model", "reference", "opponent", "reward_funcs", "judges", "dataset", "train_dataset", "eval_dataset"} | {
    *("output", "output_dir", "logging_dir", "run_name", "hub_model_id", "runs", "resume", "member_starts"),
}
_SECRET_NAME = re.compile(rf"(?i)^(?!(?:eos|bos|pad|unk|sep|cls|mask)_token$){_NAMES}$")
_SECRET_OPTION = re.compile(rf"(?i)^--{_NAMES}$")
_NOT_PLAIN = re.compile(r"[^\x20-\x7e\n\t]")
_CONTROL = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Zero-width joiners belong to emoji and to several scripts; all other format characters can hide or reorder text.
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    r"""Return `text` with control, format and separator characters as escapes (`\x1b`); newlines and tabs are kept."""
    return _NOT_PLAIN.sub(lambda match: _shown(match.group()), text)


def _shown(char: str) -> str:
    if unicodedata.category(char) not in _CONTROL or char in _JOINERS:
        return char
    return char.encode("unicode_escape").decode("ascii")


def redact(text: str, *, is_name: bool = False) -> str:
    """`text` without tokens, bearer headers, and passwords in addresses.

    Args:
        text: any text.
        is_name: it names a model, data or a file: what begins as a key does and consists of words is kept.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return _KEY.sub(lambda found: found[0] if is_name and _is_of_words(found[0]) else HIDDEN, text)


def _is_of_words(text: str) -> bool:
    return all(_WORD.fullmatch(part) for part in re.split("[-_]", text))


def redacted(value: Any, *, is_name: bool = False) -> Any:
    """`value` with all its texts redacted (see `redact`), and all entries whose names mark them as secrets."""
    if isinstance(value, str):
        return redact(value, is_name=is_name)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN
            if isinstance(item, str) and _SECRET_NAME.match(str(key))
            else redacted(item, is_name=is_name or key in _NAMING)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        after = [isinstance(item, str) and _SECRET_OPTION.match(item) for item in value]  # --api-key, then the key
        pairs = zip(value, [None, *after], strict=False)
        return [
            HIDDEN if secret and isinstance(item, str) else redacted(item, is_name=is_name) for item, secret in pairs
        ]
    return value
