"""Engines: who generates. `Engine` is the seam; `TransformersEngine` (in `bondlm.engines.local.engine`) the default."""

from bondlm.engines.base import Completion, Engine, RemoteEngine, Role

__all__ = ["Completion", "Engine", "RemoteEngine", "Role"]
