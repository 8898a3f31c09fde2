"""The engine's weights from one safetensors file, by NumPy."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..checkpoint.limits import MAX_SAFETENSORS_HEADER_BYTES, CheckpointError, parse_json
from ..checkpoint.names import hf_shapes
from ..engine.buffers import NUMPY_DTYPES, empty
from ..engine.matrix import Matrix
from ..engine.parts import Constants, EngineWeights, assemble, frequencies
from ..memory import available_memory
from ..shapes import describe
from .settings import NotServedError, PlainConfig, refuse_unless

_FORMATS = {"bfloat16": ("BF16", "bf16"), "float32": ("F32", "fp32")}
"""For a dtype in config.json, its name in safetensors and the engine's format."""
_ROWS = 64
"""Rows that are transposed at a time: a cache line of each output row."""


class _Span(NamedTuple):
    shape: tuple[int, ...]
    start: int


def read_weights(folder: Path, config: PlainConfig) -> EngineWeights:
    """The weights of a folder's `model.safetensors`, which must have exactly the tensors that `config` asks for.

    Raises:
        NotServedError: anything else, weights of `down_proj` that are not finite, or too little memory.
    """
    path = folder / "model.safetensors"
    name, format = _FORMATS[config.dtype]
    with path.open("rb") as file:
        spans = _header(file, path, config, name)
        left = available_memory()
        refuse_unless(left is None or path.stat().st_size <= left, "more memory than is free")
        source = _FileSource(file, spans, format)
        family = describe(config).family
        constants = Constants(
            config.num_hidden_layers,
            config.head_dim,
            config.intermediate_size,
            config.norm_eps,
            config.tie_word_embeddings,
            frequencies(config.rotary_dim, config.rope_theta),
            1.0,
            family.gated,
            family.norm.offset,
        )
        return assemble(constants, source, format)


def _header(file: BinaryIO, path: Path, config: PlainConfig, dtype: str) -> dict[str, _Span]:
    """Where each tensor is, checked: names, shapes and dtype are those asked for, and the data fills the file."""
    size = path.stat().st_size
    first = file.read(8)
    refuse_unless(len(first) == 8, "a safetensors file without a header")
    (length,) = struct.unpack("<Q", first)
    refuse_unless(length <= min(MAX_SAFETENSORS_HEADER_BYTES, size - 8), "a safetensors header that is too long")
    try:
        header = parse_json(file.read(length), path)
    except CheckpointError as error:
        raise NotServedError(str(error)) from None
    about = header.pop("__metadata__", {"format": "pt"})
    refuse_unless(about == {"format": "pt"}, "__metadata__ of another kind")
    expected = hf_shapes(config)  # type: ignore[arg-type]
    refuse_unless(header.keys() == expected.keys(), "other tensors than config.json asks for")
    itemsize = np.dtype(NUMPY_DTYPES[_FORMATS[config.dtype][1]]).itemsize
    base, found, ends = 8 + length, {}, []
    for name, entry in header.items():
        refuse_unless(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, "an odd header")
        refuse_unless(entry["dtype"] == dtype and entry["shape"] == list(expected[name]), f"another {name}")
        start, stop = _offsets(entry["data_offsets"])
        refuse_unless(stop - start == itemsize * int(np.prod(expected[name], dtype=np.int64)), f"offsets of {name}")
        found[name] = _Span(expected[name], base + start)
        ends.append((start, stop))
    ends.sort()
    joined = all(before[1] == after[0] for before, after in itertools.pairwise(ends))
    refuse_unless(joined and ends[0][0] == 0 and base + ends[-1][1] == size, "data that does not fill the file")
    return found


def _offsets(value: Any) -> tuple[int, int]:
    good = isinstance(value, list) and len(value) == 2 and all(type(x) is int for x in value)
    refuse_unless(good and 0 <= value[0] <= value[1], "odd data_offsets")
    return value[0], value[1]


class _FileSource:
    """A `parts.Source`; matrices keep the dtype of the file."""

    def __init__(self, file: BinaryIO, spans: dict[str, _Span], format: str) -> None:
        self._file, self._spans, self._format = file, spans, format

    def shape(self, name: str) -> tuple[int, ...] | None:
        span = self._spans.get(name)
        return None if span is None else span.shape

    def vector(self, name: str) -> np.ndarray:
        found = self._read(name)
        return (found.astype(np.uint32) << np.uint32(16)).view(np.float32) if self._format == "bf16" else found

    def rows(self, name: str, format: str) -> Matrix:
        found = self._read(name)
        return Matrix(format, (found.shape[0], found.shape[1]), found)

    def transposed(self, name: str, format: str) -> Matrix:
        found = self._read(name)
        refuse_unless(_all_finite(found), f"numbers of {name} that are not finite")
        turned = empty((found.shape[1], found.shape[0]), found.dtype)
        for start in range(0, found.shape[0], _ROWS):
            turned[:, start : start + _ROWS] = found[start : start + _ROWS].T
        return Matrix(format, (found.shape[1], found.shape[0]), turned)

    def _read(self, name: str) -> np.ndarray:
        span = self._spans[name]
        out = empty(span.shape, NUMPY_DTYPES[self._format])
        view = out.data.cast("B")
        self._file.seek(span.start)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            refuse_unless(count, "a file that was cut while it was read")
            done += count
        return out


def _all_finite(matrix: np.ndarray) -> bool:
    """Whether no number is NaN or infinite: their exponents are all ones."""
    if matrix.dtype == np.uint16:
        return int((matrix & np.uint16(0x7FFF)).max(initial=0)) < 0x7F80
    return bool(np.isfinite(matrix.max(initial=0)) and np.isfinite(matrix.min(initial=0)))
