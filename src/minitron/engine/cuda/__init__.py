"""The CUDA engine: decode steps as CUDA graphs, sampling on the device, prefill by SDPA."""

from __future__ import annotations

from types import ModuleType

from ...submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
