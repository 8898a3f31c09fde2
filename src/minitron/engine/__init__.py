"""Text generation close to the memory bandwidth: quantized weights, a torch reference, a CPU decode step in Numba."""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
