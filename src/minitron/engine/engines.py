"""The one place that chooses an engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from ..engine_hook import ENGINE_CHOICE
from .base import DecodeEngine
from .kv import KeyValues
from .parts import EngineWeights
from .reference import ReferenceEngine


def open_engine(weights: EngineWeights, capacity: int, slots: int = 1, kv: KeyValues | None = None) -> DecodeEngine:
    """The CUDA engine for weights on a GPU, or where `generate` was told `engine="cuda"`; otherwise the compiled CPU
    engine, or the reference where Numba is missing.

    Args:
        weights: of the model.
        capacity: largest length of a sequence.
        slots: number of sequences.
        kv: a cache of another engine with the same layers, to share.

    Raises:
        ValueError: the cache does not fit into the memory of the GPU, or its engine does not read the weights' format.
    """
    if _on_cuda(weights):
        from .cuda.engine import CudaEngine

        return CudaEngine(weights, capacity, slots, kv)
    if importlib.util.find_spec("numba") is None:
        return ReferenceEngine(weights, capacity, slots, kv)
    from .cpu.engine import CpuEngine

    return CpuEngine(weights, capacity, slots=slots, kv=kv)


@contextmanager
def engine_for_call(weights: EngineWeights, capacity: int, slots: int = 1) -> Iterator[DecodeEngine]:
    """As `open_engine`, for one call of `generate`, after which it is closed, or kept for the next one on CUDA."""
    if _on_cuda(weights):
        from .cuda.weights import kept_engine

        with kept_engine(weights, capacity, slots) as engine:
            yield engine
        return
    engine = open_engine(weights, capacity, slots)
    try:
        yield engine
    finally:
        engine.close()


def _on_cuda(weights: EngineWeights) -> bool:
    device = getattr(weights.embed.data, "device", None)
    return ENGINE_CHOICE.get() == "cuda" or getattr(device, "type", "cpu") == "cuda"
