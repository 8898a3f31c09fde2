"""The report of a compression: what was done, what came out, and how good it is, as data and as one HTML page."""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
