"""Engines draw completions. `Engine` is the interface; `TransformersEngine` (`bondlm.engines.local`) is the default."""

from bondlm.engines.base import Completion, Engine, RemoteEngine, Role

__all__ = ["Completion", "Engine", "RemoteEngine", "Role"]
