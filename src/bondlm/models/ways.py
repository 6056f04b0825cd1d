"""Which computations can be batched without changing results, for each kind of model; found by probes, stored here.

A kind is a class with a config, so policy, anchor and reference are of the same kind. `bondlm.models.probe` and
`bondlm.engines.local.probe` test a model once, when a run starts; for a model that was not tested, its config decides.
"""

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from bondlm.models.facts import has_full_attention, is_recurrent

Kind = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Each way is faster than without it; all False is the plain loop, which is correct for every model."""

    prefix: bool = True  # what all prompts begin with is computed once
    padded: bool = True  # prompts of different lengths are decoded in one batch
    cached: bool = True  # a token is decoded from the keys, values or states of those before it


_KINDS: WeakKeyDictionary[nn.Module, Kind] = WeakKeyDictionary()
_FOUND: dict[Kind, Ways] = {}


def ways_of(model: Any) -> Ways:
    """The result for models of this kind, or what the config promises."""
    found = _FOUND.get(_kind(model))
    if found is not None:
        return found
    return Ways(prefix=has_full_attention(model.config), padded=not is_recurrent(model.config))


def remember(model: Any, **found: bool) -> Ways:
    """Store what a probe found, for all models of this kind."""
    _FOUND[_kind(model)] = ways = replace(ways_of(model), **found)
    return ways


def _kind(model: Any) -> Kind:
    if model not in _KINDS:
        attention = str(getattr(model.config, "_attn_implementation", ""))
        _KINDS[model] = (type(model).__qualname__, model.config.to_json_string(use_diff=False), attention)
    return _KINDS[model]
