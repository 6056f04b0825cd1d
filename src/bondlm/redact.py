"""Secrets never reach a file or a message: what looks like one is replaced before it is written."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<secret>"
_NAMES = r"(?:[a-z]+[_-])?(?:token|secret|password|passwd|api[_-]?key|access[_-]?key|authorization)"
_PATTERNS = (
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), HIDDEN),  # user and password in an address
    (re.compile(rf"(?i)([?&;]{_NAMES}=)[^&\s#'\";]+"), rf"\g<1>{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[a-z0-9._~+/=-]{8,}"), rf"\g<1>\g<2>{HIDDEN}"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|xoxb-)[A-Za-z0-9_-]{16,}"), HIDDEN),
)
_SECRET_NAME = re.compile(rf"(?i)^{_NAMES}$")


def redact(text: str) -> str:
    """`text` without tokens, bearer headers, and passwords in addresses."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redacted(value: Any) -> Any:
    """`value` with every text in it redacted, and every entry whose name says that it is a secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if isinstance(item, str) and _SECRET_NAME.match(str(key)) else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value
