"""The whole recipe: a checkpoint and a budget go in; a smaller model that was retrained, and a report, come out."""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
