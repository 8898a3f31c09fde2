"""Tensors that stay on disk until their rows are read, and the operations that conversions need on them.

A `LazyTensor` is a shape, a dtype and a function that reads rows `start..stop` of dimension 0. Slicing, joining,
padding and transposing of pieces are new functions over old ones, so a fused QKV matrix spread over four ranks is
split into q, k and v without ever being in memory. Nothing here knows a file format or a tensor name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

import numpy as np
import torch

from .limits import CheckpointError, require, tensor_bytes

if TYPE_CHECKING:
    from minitron.config import ModelConfig

Item = TypeVar("Item")

BLOCK_BYTES = 1 << 20
"""Bytes handled at a time: they stay in the processor's cache from reading to writing, and malloc reuses their memory
without page faults. 32 MB blocks took three times as long (measured with the pieces of benchmarks/convert.py)."""


@dataclass(frozen=True)
class ByteRange:
    """`size` bytes of the file `path`, from `offset`: a file of its own, or a member of an uncompressed archive."""

    path: Path
    offset: int
    size: int
    name: str = ""

    @classmethod
    def whole(cls, path: Path) -> ByteRange:
        """All of a file.

        Raises:
            CheckpointError: it is missing or not a regular file.
        """
        require(path.is_file(), f"{path}: no such file")
        return cls(path, 0, path.stat().st_size, str(path))

    def __str__(self) -> str:
        return self.name or str(self.path)

    def part(self, offset: int, size: int, name: str = "") -> ByteRange:
        """A range inside this one.

        Raises:
            CheckpointError: it does not lie inside.
        """
        inside = min(offset, size) >= 0 and offset + size <= self.size
        require(inside, f"{self}: bytes {offset:,} to {offset + size:,} of {self.size:,}; the file is cut or corrupted")
        return ByteRange(self.path, self.offset + offset, size, name or self.name)

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """Bytes `start .. start + size` (to the end if None)."""
        size = self.size - start if size is None else size
        self.part(start, size)
        with self.path.open("rb") as file:
            file.seek(self.offset + start)
            data = file.read(size)
        require(len(data) == size, f"{self}: ended after {len(data):,} of {size:,} bytes; the file is cut")
        return data

    def read_small(self, max_bytes: int) -> bytes:
        """All bytes of what is expected to be small.

        Raises:
            CheckpointError: longer than `max_bytes`; cut.
        """
        require(self.size <= max_bytes, f"{self}: {self.size:,} bytes, expected at most {max_bytes:,}")
        return self.read()

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start`."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                require(count, f"{self}: ended {len(buffer) - done:,} bytes too early; the file is cut")
                done += count


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype; `rows(start, stop)` reads that part of dimension 0."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return tensor_bytes(self.shape, self.dtype.itemsize, "tensor")

    @property
    def height(self) -> int:
        """Rows; a scalar is one."""
        return self.shape[0] if self.shape else 1

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[torch.Tensor]:
        """The tensor from top to bottom, in pieces of at most `max_bytes` (but of one row at least)."""
        row_bytes = max(1, self.nbytes // max(1, self.height))
        step = max(1, max_bytes // row_bytes)
        for start in range(0, self.height, step):
            yield self.rows(start, min(start + step, self.height))

    def load(self) -> torch.Tensor:
        """The whole tensor in memory."""
        return self.rows(0, self.height)

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same values in another dtype."""
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda start, stop: self.rows(start, stop).to(dtype))

    def take_rows(self, runs: Sequence[tuple[int, int]]) -> LazyTensor:
        """The rows of `runs`, (start, stop) each, in that order."""
        for start, stop in runs:
            require(0 <= start <= stop <= self.shape[0], f"rows {start} to {stop} of a tensor of shape {self.shape}")
        return join_rows([self._run(start, stop) for start, stop in runs])

    def _run(self, start: int, stop: int) -> LazyTensor:
        shape = (stop - start, *self.shape[1:])
        return LazyTensor(shape, self.dtype, lambda first, last: self.rows(start + first, start + last))


def from_tensor(tensor: torch.Tensor) -> LazyTensor:
    """A tensor in memory as a lazy one."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop])


def from_bytes(data: ByteRange, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """A dense row-major tensor stored as raw little-endian bytes.

    Raises:
        CheckpointError: `data` does not have the size of the tensor.
    """
    expected = tensor_bytes(shape, dtype.itemsize, data)
    require(
        data.size == expected, f"{data}: {data.size:,} bytes, expected {expected:,} for shape {list(shape)} of {dtype}"
    )
    row_items = 1
    for size in shape[1:]:
        row_items *= size

    def rows(start: int, stop: int) -> torch.Tensor:
        items = read_items(data, start * row_items, (stop - start) * row_items, dtype)
        return items.view(stop - start, *shape[1:]) if shape else items[0]

    return LazyTensor(shape, dtype, rows)


def read_items(data: ByteRange, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` values from item `first` of a raw array: a new 1-D tensor.

    NumPy provides the memory. torch asks malloc for aligned memory, which does not fit into what an earlier block of
    the same size left, so that reading in blocks keeps much of what it frees.
    """
    data.part(first * dtype.itemsize, count * dtype.itemsize)
    if not count:  # NumPy's empty arrays have strides that torch does not view
        return torch.empty(0, dtype=dtype)
    out = np.empty(count * dtype.itemsize, np.uint8)
    data.read_into(out.data, first * dtype.itemsize)
    return torch.from_numpy(out).view(dtype)


def join_rows(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors stacked along dimension 0."""
    if len(parts) == 1:
        return parts[0]
    shapes = {part.shape[1:] for part in parts}
    dtypes = {part.dtype for part in parts}
    require(len(shapes) == 1, f"pieces of one tensor have rows of different shapes: {sorted(shapes)}")
    require(len(dtypes) == 1, f"pieces of one tensor have different dtypes: {sorted(map(str, dtypes))}")
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.shape[0])

    def rows(start: int, stop: int) -> torch.Tensor:
        found = [
            part.rows(max(start, first) - first, min(stop, last) - first)
            for part, first, last in zip(parts, starts[:-1], starts[1:], strict=True)
            if first < stop and last > start
        ]
        return found[0] if len(found) == 1 else torch.cat(found) if found else parts[0].rows(0, 0)

    return LazyTensor((starts[-1], *parts[0].shape[1:]), parts[0].dtype, rows)


def join_columns(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Matrices side by side (dimension 1)."""
    if len(parts) == 1:
        return parts[0]
    heights = {part.shape[0] for part in parts}
    ranks = {len(part.shape) for part in parts}
    dtypes = {part.dtype for part in parts}
    require(ranks == {2} and len(heights) == 1, f"cannot join side by side: {[part.shape for part in parts]}")
    require(len(dtypes) == 1, f"pieces of one tensor have different dtypes: {sorted(map(str, dtypes))}")
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    return LazyTensor(
        shape,
        parts[0].dtype,
        lambda start, stop: torch.cat([part.rows(start, stop) for part in parts], dim=1),
    )


def pad_rows(tensor: LazyTensor, height: int) -> LazyTensor:
    """`tensor` with rows of zeros below, up to `height` rows."""
    missing = height - tensor.shape[0]
    require(missing >= 0, f"cannot pad {tensor.shape[0]} rows to {height}")
    if not missing:
        return tensor
    return join_rows([tensor, zeros((missing, *tensor.shape[1:]), tensor.dtype)])


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """A tensor of zeros."""
    return LazyTensor(shape, dtype, lambda start, stop: torch.zeros((stop - start, *shape[1:]), dtype=dtype))


_END = object()


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items in the same order, the next one being made in another thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, _END)
        while (item := future.result()) is not _END:
            future = pool.submit(next, items, _END)
            yield cast("Item", item)


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, little-endian and row-major, without a copy where it lies so already."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write everything; an unbuffered file may take less than it is given."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


@dataclass
class Checkpoint:
    """A causal language model on disk: its config, its tensors under Hugging Face names, and its other files.

    `files` maps a file name to where its bytes are: tokenizer, generation config, chat template. `notes` are
    sentences for the user about what was normalised or dropped on reading; `differences` those about texts that the
    tokenizer in `texts` reads otherwise than the one in the file.
    """

    config: ModelConfig
    tensors: dict[str, LazyTensor]
    files: dict[str, ByteRange] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def get(self, name: str) -> LazyTensor:
        """A tensor by its Hugging Face name.

        Raises:
            CheckpointError: there is none.
        """
        if name not in self.tensors:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        return self.tensors[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
