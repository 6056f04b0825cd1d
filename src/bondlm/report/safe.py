"""Make text from models and data harmless in a page: visible control characters, JSON that cannot end its block."""

import json
from typing import Any

from bondlm.runs.redact import visible

__all__ = ["script_json", "visible"]


def script_json(value: Any) -> str:
    """Return JSON for a `<script type="application/json">` block: it contains no `<`, `>`, `&` or line separator."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
