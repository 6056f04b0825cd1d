"""Rules for the values of settings, stated by objectives and `BONDConfig` and all checked in the same way."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from bondlm.errors import ConfigError

LEAST_TEMPERATURE = 0.01  # smaller values mean greedy decoding, and logits divided by them may overflow


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition on a value, and its description in words."""

    holds: Callable[[Any], bool]
    text: str

    def problem(self, name: str, value: Any) -> str | None:
        """The sentence that refuses the value; None if it is allowed."""
        return None if self.holds(value) else f"{name}={value!r}: {self.text}"


def between(least: float, most: float, why: str = "") -> Rule:
    """A number in [least, most]."""
    return Rule(lambda v: _is_number(v) and least <= v <= most, f"must lie in [{least:g}, {most:g}]{_so(why)}")


def at_least(least: float, why: str = "") -> Rule:
    """A number >= least; infinity will do."""
    return Rule(lambda v: _is_number(v) and v >= least, f"must be >= {least:g}{_so(why)}")


def finite(least: float, why: str = "") -> Rule:
    """A number >= least, and finite."""
    return Rule(
        lambda v: _is_number(v) and v >= least and math.isfinite(v), f"must be >= {least:g} and finite{_so(why)}"
    )


def above(bound: float, why: str = "") -> Rule:
    """A number > bound; infinity will do."""
    return Rule(lambda v: _is_number(v) and v > bound, f"must be > {bound:g}{_so(why)}")


def whole(least: int, why: str = "") -> Rule:
    """A whole number >= least."""
    return Rule(
        lambda v: isinstance(v, Integral) and int(v) >= least,
        f"must be an integer >= {least}{_so(why)}",
    )


def one_of(*values: str, why: str = "") -> Rule:
    """One of a few words."""
    return Rule(lambda v: v in values, f"choose one of {', '.join(values)}{_so(why)}")


def beginning_with(*starts: str) -> Rule:
    """Text that begins with one of these, or a list of such texts, all different also without a last / or /v1."""

    def holds(value: Any) -> bool:
        texts = value if isinstance(value, list) and value else [value]
        if not all(isinstance(t, str) and t.startswith(starts) for t in texts):
            return False
        return len({t.rstrip("/").removesuffix("/v1") for t in texts}) == len(texts)

    return Rule(holds, f"must begin with {' or '.join(starts)} (every entry of a list), without duplicates")


def temperature() -> Rule:
    """0 (greedy), or a finite number that logits can be divided by."""
    return Rule(
        lambda v: _is_number(v) and not isinstance(v, bool) and (v == 0 or LEAST_TEMPERATURE <= v < math.inf),
        f"must be 0 (greedy) or at least {LEAST_TEMPERATURE}",
    )


def off(why: str) -> Rule:
    """Not set, or False; `why` says what would happen otherwise."""
    return Rule(lambda v: not v, why)


def check(owner: object, **rules: Rule) -> None:
    """Raise one ConfigError that names every attribute of `owner` that breaks its rule."""
    problems = [rule.problem(name, getattr(owner, name)) for name, rule in rules.items()]
    if found := [problem for problem in problems if problem is not None]:
        raise ConfigError("; ".join(found))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


def _so(why: str) -> str:
    return f" ({why})" if why else ""
