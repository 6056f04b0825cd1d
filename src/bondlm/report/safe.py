"""Text from models and data, made harmless for a page: control characters visible, JSON that cannot end its block."""

import json
import re
import unicodedata
from typing import Any

_NOT_PLAIN = re.compile(r"[^\x20-\x7e\n\t]")
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Zero-width joiners belong to emoji and to several scripts; all other format characters can hide or reorder text.
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    r"""Return `text` with control, format and separator characters as escapes (`\x1b`); new lines and tabs stay."""
    return _NOT_PLAIN.sub(lambda match: _shown(match.group()), text)


def _shown(char: str) -> str:
    if unicodedata.category(char) not in _HIDDEN or char in _JOINERS:
        return char
    return char.encode("unicode_escape").decode("ascii")


def script_json(value: Any) -> str:
    """Return JSON for a `<script type="application/json">` block: no `<`, `>`, `&` or line separator stands in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
