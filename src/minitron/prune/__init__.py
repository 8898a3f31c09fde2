"""Structured pruning: importance scores, a plan of what stays, and the cut."""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
