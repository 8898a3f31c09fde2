"""The weights of a model on a device as the engine reads them, and the engine that is kept for the next call.

Matrices are the model's own memory, so a change of them needs no copy. What is copied (gains and biases in fp32,
transposed or quantized matrices) is compared with the model at each call, and made anew where something has changed.
An engine is kept with its cache and its graphs between two calls of `generate`, so that no graph is captured again
(what that saves was not measured); it goes when the model goes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...finite import NotFiniteError
from ..matrix import CUDA_FORMATS, PLAIN_BYTES, Matrix
from ..parts import EMBEDDING, Constants, EngineWeights, Norm, assemble
from ..quantize import quantize
from ..weights import constants_of, format_of, tensors_of
from .engine import CudaEngine
from .steps import TorchSteps
from .triton_steps import steps_for, why_no_kernels


@dataclass(eq=False)
class DeviceWeights(EngineWeights):
    """The weights of a model on one device."""

    kept: weakref.ref[_Kept] | None = None
    """Where the engine of these weights waits for the next call. Weak, because that engine has the weights."""
    steps: TorchSteps | None = None
    """The pieces of a step, for all engines of these weights: kernels have copies of some matrices."""


@dataclass(eq=False)
class _Kept:
    """What is kept of a model between two calls."""

    made: InitVar[EngineWeights]
    key: tuple[Any, ...]
    """Where the shared matrices are, and the constants."""
    vectors: Tensor
    """All gains and biases of the model when the weights were made."""
    sums: list[int]
    """Checksums of the matrices that were copied, see `_sums`."""
    idle: list[CudaEngine] = field(default_factory=list)
    weights: DeviceWeights = field(init=False)

    def __post_init__(self, made: EngineWeights) -> None:
        self.weights = DeviceWeights(**{one.name: getattr(made, one.name) for one in fields(EngineWeights)})
        self.weights.kept = weakref.ref(self)
        self.weights.steps = steps_for(self.weights)


_models: weakref.WeakKeyDictionary[nn.Module, dict[str, _Kept]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def device_weights(model: PreTrainedModel, format: str | None = None) -> DeviceWeights:
    """The model's weights as they are now; the same object as long as nothing has changed.

    Args:
        model: one that the engine runs, see `models.why_not_model`.
        format: "int8" or "int4" for a quantized copy; that of the model's dtype if None.

    Raises:
        NotFiniteError: weights of `down_proj` are NaN or infinite, where neurons that are zero are skipped.
        ValueError: see `engine.quantize.quantize`.
    """
    tensors = tensors_of(model)
    own = format_of(tensors[f"{EMBEDDING}.weight"].dtype)
    name = format or own
    source = _DeviceSource(tensors, own)
    matrices = {key: tensor for key, tensor in tensors.items() if tensor.dim() == 2}
    constants = constants_of(model)
    key = (_comparable(constants), *((k, t.data_ptr(), t.shape, t.stride(), t.dtype) for k, t in matrices.items()))
    vectors = torch.cat([tensor.flatten() for tensor in tensors.values() if tensor.dim() == 1])
    with _lock:
        formats = _models.setdefault(model, {})
        kept = formats.get(name)
        if kept is not None and kept.key == key and torch.equal(kept.vectors, vectors):
            copies = _copied(kept.weights, own, matrices)
            if kept.sums == _sums([matrices[one] for one in copies]):
                return kept.weights
        made = assemble(constants, source, name)
        if not constants.gated and not why_no_kernels(made):
            _turn_down(made)
        sums = _sums([matrices[one] for one in _copied(made, own, matrices)])
        formats[name] = _Kept(made, key, vectors, sums)
        return formats[name].weights


def kept_weights(model: nn.Module, weights: EngineWeights) -> DeviceWeights:
    """The weights of a model that has no others, as an object that stays the same while its constants do."""
    key = (_comparable(weights.constants), weights.embed.data.data_ptr())
    with _lock:
        formats = _models.setdefault(model, {})
        kept = formats.get(weights.format)
        if kept is None or kept.key != key:
            kept = formats[weights.format] = _Kept(weights, key, torch.empty(0), [])
        return kept.weights


def on_device(weights: EngineWeights, device: torch.device) -> EngineWeights:
    """A copy of weights on a device, or the weights themselves if they are there.

    Raises:
        ValueError: they are in a format that the CUDA engine does not read.
    """
    if weights.embed.data.device == device:
        return weights
    if weights.format not in CUDA_FORMATS:
        raise ValueError(f"weights are {weights.format}; on {device} the engine reads {', '.join(CUDA_FORMATS)}")
    moved: dict[int, Any] = {}

    def move(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device)
        if isinstance(part, Norm):
            return Norm(part.gain.to(device), None if part.offset is None else part.offset.to(device))
        if isinstance(part, Matrix):  # a tied head is the embedding there too
            if id(part) not in moved:
                moved[id(part)] = Matrix(part.format, part.shape, part.data.to(device))
            return moved[id(part)]
        return part

    layers = [
        replace(layer, **{one.name: move(getattr(layer, one.name)) for one in fields(layer)})
        for layer in weights.layers
    ]
    return replace(weights, layers=layers, embed=move(weights.embed), head=move(weights.head), norm=move(weights.norm))


def has_device_copies(model: PreTrainedModel, format: str) -> bool:
    """Whether the model's matrices were copied in a format."""
    with _lock:
        return format in _models.get(model, {})


@contextmanager
def kept_engine(weights: EngineWeights, capacity: int, slots: int) -> Iterator[CudaEngine]:
    """An engine with room for so many sequences: the one that the last call has left, or a new one."""
    kept = weights.kept() if isinstance(weights, DeviceWeights) and weights.kept is not None else None
    engine = None
    with _lock:
        if kept is not None and kept.idle and len(kept.idle[0].kv.lengths) >= slots:
            engine = kept.idle.pop()
        elif kept is not None:
            kept.idle.clear()  # its memory is needed
    if engine is None:
        engine = CudaEngine(weights, capacity, slots)
    engine.reserve(capacity)
    try:
        yield engine
    finally:
        engine.reset()
        with _lock:
            if kept is not None and not kept.idle:
                kept.idle.append(engine)


class _DeviceSource:
    """A `parts.Source` whose matrices stay where they are."""

    def __init__(self, tensors: dict[str, Tensor], own: str) -> None:
        self._tensors, self._own = tensors, own

    def shape(self, name: str) -> tuple[int, ...] | None:
        found = self._tensors.get(name)
        return None if found is None else tuple(found.shape)

    def vector(self, name: str) -> np.ndarray:
        return self._tensors[name].float().contiguous().cpu().numpy()

    def rows(self, name: str, format: str) -> Matrix:
        return self._in_format(self._tensors[name], format)

    def transposed(self, name: str, format: str) -> Matrix:
        return self._in_format(self._tensors[name].T, format)  # a view in the model's own format

    def _in_format(self, tensor: Tensor, format: str) -> Matrix:
        if format == self._own:
            return Matrix(format, (tensor.shape[0], tensor.shape[1]), tensor)
        assert format not in PLAIN_BYTES, format
        made = quantize(tensor.cpu(), format)  # type: ignore[arg-type] (compiled code packs them on the CPU)
        return Matrix(made.format, made.shape, made.data.to(tensor.device))


COPIED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "down_proj.weight")
"""Ends of the names of matrices of which `TritonSteps` has a copy in a plain format."""


def _copied(weights: EngineWeights, own: str, matrices: dict[str, Tensor]) -> list[str]:
    """The names of the matrices that are not shared with the model."""
    if weights.format != own:
        return list(matrices)
    return [] if why_no_kernels(weights) else [name for name in matrices if name.endswith(COPIED)]


def _turn_down(weights: EngineWeights) -> None:
    """Make the rows of the neurons contiguous, which kernels skip where they are zero.

    Raises:
        NotFiniteError: some are NaN or infinite: zero times NaN is NaN.
    """
    for index, layer in enumerate(weights.layers):
        if layer.down.format in PLAIN_BYTES:
            turned = layer.down.data.contiguous()
            if turned.numel() and not bool(turned.isfinite().all()):
                raise NotFiniteError(f"some numbers of model.layers.{index}.mlp.down_proj.weight are NaN or infinite")
            layer.down = replace(layer.down, data=turned)


def _sums(tensors: list[Tensor]) -> list[int]:
    """Two checksums of each matrix: the sums of its rows and those of its columns, weighted by where they are."""
    found = []
    for tensor in tensors:
        bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        for axis in (0, 1):
            sums = bits.sum(axis, dtype=torch.int64)
            found.append((sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum())
    return torch.stack(found).tolist() if found else []


def _comparable(constants: Constants) -> tuple[Any, ...]:
    values = (getattr(constants, one.name) for one in fields(constants))
    return tuple(value.tobytes() if isinstance(value, np.ndarray) else value for value in values)
