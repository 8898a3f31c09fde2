"""The CPU engine: Numba kernels, the compiled decode step, prefill."""

from __future__ import annotations

from types import ModuleType

from ...submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
