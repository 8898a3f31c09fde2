"""The one place that chooses an engine."""

from __future__ import annotations

import importlib.util

from .base import DecodeEngine
from .kv import KeyValues
from .parts import EngineWeights
from .reference import ReferenceEngine


def open_engine(weights: EngineWeights, capacity: int, slots: int = 1, kv: KeyValues | None = None) -> DecodeEngine:
    """The compiled engine, or the reference where Numba is missing.

    Args:
        weights: of the model.
        capacity: largest length of a sequence.
        slots: number of sequences.
        kv: a cache of another engine with the same layers, to share.
    """
    if importlib.util.find_spec("numba") is None:
        return ReferenceEngine(weights, capacity, slots, kv)
    from .cpu.engine import CpuEngine

    return CpuEngine(weights, capacity, slots=slots, kv=kv)
