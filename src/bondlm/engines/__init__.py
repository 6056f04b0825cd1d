"""Engines: who generates. `Engine` is the seam; `TransformersEngine` (in `bondlm.engines.hf`) the default."""

from bondlm.engines.base import Completion, Engine, Role

__all__ = ["Completion", "Engine", "Role"]
