"""Text from models and data, made harmless for a page: control characters visible, JSON that cannot end its block."""

import json
from typing import Any

from bondlm.runs.redact import visible

__all__ = ["script_json", "visible"]


def script_json(value: Any) -> str:
    """Return JSON for a `<script type="application/json">` block: no `<`, `>`, `&` or line separator stands in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
