"""What measures: decoding speed, peers, roofline and fidelity. Nothing decodes through it."""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
