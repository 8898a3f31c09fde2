"""Megatron's distributed checkpoints: zarr and torch_dist folders, as grids of chunks that lie in files.

Both store a tensor of all layers with the layer in dimension 0, cut along dimension 0 (layers) and along the
dimension that tensor parallelism splits. Nothing here knows what the tensors mean.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from ..archive import Files
from ..limits import (
    MAX_CHUNKS,
    MAX_CONFIG_BYTES,
    MAX_DIMENSION,
    MAX_PICKLE_BYTES,
    MAX_RANK,
    MAX_TENSORS,
    CheckpointError,
    member_path,
    parse_json,
    require,
    shown,
    tensor_bytes,
)
from ..pickles import Inert, TensorRef, load_inert
from ..tensors import ByteRange, LazyTensor, from_bytes, join_columns, join_rows
from ..torch_file import TorchFile

_ZARR_DTYPES = {
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<f8": torch.float64,
    "bfloat16": torch.bfloat16,
    "<u2": torch.bfloat16,  # numpy has no bfloat16; some writers label its bits as uint16
    "<V2": torch.bfloat16,
    "|V2": torch.bfloat16,
}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it starts, its size, its row-major bytes."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    data: ByteRange


@dataclass(frozen=True)
class Grid:
    """A tensor in chunks."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Sequence[Chunk]

    def tensor(self) -> LazyTensor:
        """The whole of a tensor that is not stacked over layers (a vector or a matrix).

        Raises:
            CheckpointError: chunks do not tile the tensor: ranks are missing.
        """
        return self._tile(self.shape, [(c.offset, c.size, c.data) for c in self.chunks])

    def layers(self) -> list[LazyTensor]:
        """The layers of a tensor that is stacked over them in dimension 0.

        Raises:
            CheckpointError: see `tensor`; more than MAX_CHUNKS pieces of layers.
        """
        pieces = sum(chunk.size[0] for chunk in self.chunks)
        require(pieces <= MAX_CHUNKS, f"{self.name}: {pieces:,} pieces of layers, expected at most {MAX_CHUNKS:,}")
        boxes: list[list[tuple[tuple[int, ...], tuple[int, ...], ByteRange]]] = [[] for _ in range(self.shape[0])]
        for chunk in self.chunks:
            size = chunk.data.size // max(1, chunk.size[0])
            for within in range(chunk.size[0]):
                box = (chunk.offset[1:], chunk.size[1:], chunk.data.part(within * size, size))
                boxes[chunk.offset[0] + within].append(box)
        return [self._tile(self.shape[1:], layer) for layer in boxes]

    def _tile(
        self, shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...], ByteRange]]
    ) -> LazyTensor:
        require(len(shape) in (1, 2), f"{self.name}: {len(shape)} dimensions, expected a vector or a matrix")
        bands: dict[int, list[tuple[int, LazyTensor]]] = {}
        for offset, size, data in boxes:
            tensor = from_bytes(data, size, self.dtype)
            bands.setdefault(offset[0], []).append((offset[1] if len(shape) == 2 else 0, tensor))
        rows, parts = 0, []
        for start in sorted(bands):
            require(start == rows, f"{self.name}: rows {rows} to {start} are missing; is a rank's file missing?")
            band = sorted(bands[start], key=lambda piece: piece[0])
            columns = 0
            for left, tensor in band:
                require(left == columns, f"{self.name}: columns from {columns} are missing; is a rank's file missing?")
                columns += tensor.shape[1] if len(shape) == 2 else 0
            require(len(shape) == 1 or columns == shape[1], f"{self.name}: columns from {columns} are missing")
            require(len(shape) == 2 or len(band) == 1, f"{self.name}: two chunks start at {start}")
            parts.append(join_columns([tensor for _, tensor in band]))
            rows += parts[-1].shape[0]
        require(
            rows == shape[0] and parts, f"{self.name}: rows from {rows} of {shape[0]} are missing; is a rank missing?"
        )
        return join_rows(parts)


def read_distributed(files: Files, where: str, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Grid]:
    """The tensors of a distributed checkpoint folder (`metadata.json`, then zarr or torch_dist).

    Only those of `wanted` names are opened: a training checkpoint holds the optimizer's state as well.

    Raises:
        CheckpointError: neither of the two; anything missing, cut or contradictory.
    """
    backend = "torch_dist" if ".metadata" in files else "zarr"
    if "metadata.json" in files:
        text = files["metadata.json"]
        require(text.size <= MAX_CONFIG_BYTES, f"{text}: too long")
        backend = parse_json(text.read(), text).get("sharded_backend", backend)
    require(
        backend in ("zarr", "torch_dist"), f"{where}: sharded_backend is {shown(backend)}, expected zarr or torch_dist"
    )
    grids = read_zarr(files, where, wanted) if backend == "zarr" else read_torch_dist(files, where, wanted)
    require(grids, f"{where}: no tensors in this distributed checkpoint")
    return grids


def read_zarr(files: Files, where: str, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Grid]:
    """Zarr version 2 arrays, one folder each, without compression (as Megatron writes them)."""
    grids = {}
    for name, entry in files.items():
        folder, _, last = name.rpartition("/")
        array = folder.replace("/", ".")
        if last == ".zarray" and wanted(array):
            require(len(grids) < MAX_TENSORS, f"{where}: more than {MAX_TENSORS:,} arrays")
            grids[array] = _zarr_array(folder, entry, files)
    return grids


def _zarr_array(folder: str, entry: ByteRange, files: Files) -> Grid:
    require(entry.size <= MAX_CONFIG_BYTES, f"{entry}: too long")
    header = parse_json(entry.read(), entry)
    version = header.get("zarr_format")
    require(version == 2, f"{entry}: zarr_format {shown(version)}, expected 2")
    plain = header.get("compressor") is None and not header.get("filters") and header.get("order", "C") == "C"
    require(plain, f"{entry}: compressed, filtered or column-major chunks, expected plain ones as Megatron writes them")
    label: Any = header.get("dtype")
    known = isinstance(label, str) and label in _ZARR_DTYPES
    require(known, f"{entry}: dtype {shown(label)}, expected {list(_ZARR_DTYPES)}")
    dtype = _ZARR_DTYPES[label]
    shape, sizes = header.get("shape"), header.get("chunks")
    if not isinstance(shape, list) or not isinstance(sizes, list) or not len(shape) == len(sizes) > 0:
        raise CheckpointError(
            f"{entry}: shape {shown(shape)} and chunks {shown(sizes)}, expected two lists of one length"
        )
    tensor_bytes(tuple(shape), dtype.itemsize, entry)
    expected = tensor_bytes(tuple(sizes), dtype.itemsize, entry)
    require(all(size > 0 for size in sizes), f"{entry}: chunks {sizes!r}, expected sizes of at least 1")
    counts = [-(-size // step) for size, step in zip(shape, sizes, strict=True)]
    total = 1
    for count in counts:
        total *= count
    require(
        total <= min(MAX_CHUNKS, len(files)), f"{entry}: {total:,} chunks, but there are {len(files):,} files in all"
    )
    separator = header.get("dimension_separator", ".")
    require(separator in (".", "/"), f"{entry}: dimension_separator {shown(separator)}, expected '.' or '/'")
    chunks = []
    for index in itertools.product(*map(range, counts)):
        name = f"{folder}/{separator.join(map(str, index))}"
        require(name in files, f"{entry.path.parent / name}: this chunk is missing; is a rank's part missing?")
        require(files[name].size == expected, f"{files[name]}: {files[name].size:,} bytes, expected {expected:,}; cut")
        chunks.append(_edge_chunk(index, shape, sizes, files[name], dtype))
    return Grid(folder, tuple(shape), dtype, chunks)


def _edge_chunk(
    index: tuple[int, ...], shape: list[int], sizes: list[int], data: ByteRange, dtype: torch.dtype
) -> Chunk:
    """Zarr stores chunks at the edge whole; only rows may stick out here, and they are cut off."""
    offset = tuple(i * step for i, step in zip(index, sizes, strict=True))
    size = [min(step, whole - start) for step, whole, start in zip(sizes, shape, offset, strict=True)]
    if size == sizes:
        return Chunk(offset, tuple(size), data)
    short = [axis for axis, (have, full) in enumerate(zip(size, sizes, strict=True)) if have != full]
    first = short[0]
    contiguous = len(short) == 1 and all(step == 1 for step in sizes[:first])
    require(contiguous, f"{data}: a chunk that sticks out of the array along dimension {short[-1]}; not supported")
    return Chunk(offset, tuple(size), data.part(0, tensor_bytes(tuple(size), dtype.itemsize, data)))


def read_torch_dist(files: Files, where: str, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Grid]:
    """torch.distributed.checkpoint: `.metadata` says in which `.distcp` file, and where in it, each chunk lies."""
    require(".metadata" in files, f"{where}: no .metadata in it; expected a torch_dist checkpoint")
    entry = files[".metadata"]
    require(entry.size <= MAX_PICKLE_BYTES, f"{entry}: {entry.size:,} bytes, expected at most {MAX_PICKLE_BYTES:,}")
    metadata = load_inert(entry.read(), entry)
    require(isinstance(metadata, Inert), f"{entry}: not the metadata of torch.distributed.checkpoint")
    tensors, storage = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        raise CheckpointError(f"{entry}: no state_dict_metadata or storage_data")
    require(len(tensors) <= MAX_TENSORS and len(storage) <= MAX_CHUNKS, f"{entry}: too many tensors")
    places = _places(storage, entry, wanted)
    grids = {}
    for name, described in tensors.items():
        known = isinstance(described, Inert) and described.name.endswith(".TensorStorageMetadata")
        if isinstance(name, str) and known and wanted(name):
            grids[name] = _grid(name, described, places, files, entry)
    return grids


Places = dict[tuple[str, tuple[int, ...]], Inert]


def _places(storage: dict[object, object], entry: ByteRange, wanted: Callable[[str], bool]) -> Places:
    """(tensor, offset of a chunk) -> where its record is, for chunks that each have a record of their own."""
    places: Places = {}
    records = set()
    for index, info in storage.items():
        if not (isinstance(index, Inert) and isinstance(info, Inert)):
            raise CheckpointError(f"{entry}: storage_data is not as expected")
        name, offset = index.get("fqn"), index.get("offset")
        # Checked before they are hashed: equal or huge ones would make this loop quadratic.
        if not isinstance(name, str) or not _is_box(offset) or not wanted(name):
            continue
        if (name, offset) in places:
            raise CheckpointError(f"{entry}: {name}: chunk {offset} is stored twice")
        record = (info.get("relative_path"), info.get("offset"))
        if type(record[0]) is not str or type(record[1]) is not int:
            raise CheckpointError(f"{entry}: {name}: no file or offset for chunk {offset}")
        if record in records:
            raise CheckpointError(f"{entry}: {name}: chunk {offset} is stored where another chunk is")
        records.add(record)
        places[name, offset] = info
    return places


def _is_box(values: object) -> TypeGuard[tuple[int, ...]]:
    """Whether a value from a file is an offset or a size: a short tuple of whole numbers from 0."""
    if not isinstance(values, tuple) or len(values) > MAX_RANK:
        return False
    return all(type(value) is int and 0 <= value <= MAX_DIMENSION for value in values)


def _grid(name: str, described: Inert, places: Places, files: Files, entry: ByteRange) -> Grid:
    properties, shape, boxes = described.get("properties"), described.get("size"), described.get("chunks")
    state = properties.state if isinstance(properties, Inert) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, dict):  # torch before 2.1 pickles the fields by name
        dtype = state.get("dtype")
    if not _is_box(shape) or not isinstance(boxes, list) or not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{entry}: {name}: no size, chunks or dtype")
    where = f"{entry}: {name}"
    tensor_bytes(shape, dtype.itemsize, where)
    require(len(boxes) <= MAX_CHUNKS, f"{where}: {len(boxes):,} chunks, expected at most {MAX_CHUNKS:,}")
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for box in boxes:
        offset, size = _box(box, shape, where)
        if offset in found:
            raise CheckpointError(f"{where}: two chunks at {offset}")
        if (name, offset) not in places:
            raise CheckpointError(f"{where}: nothing says where chunk {offset} is stored")
        found[offset] = size
    covered, expected = sum(map(math.prod, found.values())), math.prod(shape)
    require(
        covered == expected,
        f"{where}: chunks of {covered:,} values, expected {expected:,} for shape {list(shape)}; is a rank missing?",
    )
    chunks = [
        Chunk(offset, size, _chunk_bytes(places[name, offset], files, where, size, dtype))
        for offset, size in found.items()
    ]
    return Grid(name, shape, dtype, chunks)


def _box(box: object, shape: tuple[int, ...], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and size of a chunk that lies inside `shape`."""
    offset, size = (box.get("offsets"), box.get("sizes")) if isinstance(box, Inert) else (None, None)
    if _is_box(offset) and _is_box(size):
        alike = len(offset) == len(size) == len(shape)
        if alike and all(o + s <= whole for o, s, whole in zip(offset, size, shape, strict=True)):
            return offset, size
    raise CheckpointError(f"{where}: chunk {shown(offset)} {shown(size)} does not lie in {list(shape)}")


def _chunk_bytes(info: Inert, files: Files, where: str, size: tuple[int, ...], dtype: torch.dtype) -> ByteRange:
    path, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
    if not (isinstance(path, str) and isinstance(offset, int) and isinstance(length, int)):
        raise CheckpointError(f"{where}: no file, offset or length")
    require(not info.get("transform_descriptors"), f"{where}: stored transformed (compressed), not supported")
    path = member_path(path, where).as_posix()
    require(path in files, f"{where}: lies in {path}, which is missing")
    record = TorchFile(files[path].part(offset, length, f"{files[path]} ({where.rpartition(' ')[2]})"))
    ref = record.value
    require(isinstance(ref, TensorRef), f"{record.data}: the record is not a tensor")
    same = ref.size == size and ref.dtype == dtype
    require(
        same,
        f"{record.data}: shape {list(ref.size)} and {ref.dtype}, .metadata says {list(size)} and {dtype}",
    )
    data = record.contiguous(ref)
    if data is None:
        raise CheckpointError(f"{record.data}: the chunk is not row-major")
    return data


def metadata_json(backend: str) -> bytes:
    """The `metadata.json` that Megatron looks for first."""
    values = {
        "sharded_backend": backend,
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    return json.dumps(values).encode()
