"""Megatron's distributed checkpoints: zarr and torch_dist folders, as grids of chunks that lie in files.

Both store a tensor of all layers with the layer in dimension 0, cut along dimension 0 (layers) and along the
dimension that tensor parallelism splits. Nothing here knows what the tensors mean.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .archive import Files
from .limits import (
    MAX_CHUNKS,
    MAX_JSON_BYTES,
    MAX_TENSORS,
    CheckpointError,
    member_path,
    parse_json,
    require,
    tensor_bytes,
)
from .pickles import Inert, TensorRef, load_inert
from .tensors import ByteRange, LazyTensor, from_bytes, join_columns, join_rows
from .torch_file import TorchFile

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

    def layer(self, number: int) -> LazyTensor:
        """One layer of a tensor that is stacked over layers in dimension 0."""
        boxes = []
        for chunk in self.chunks:
            within = number - chunk.offset[0]
            if 0 <= within < chunk.size[0]:
                bytes_per_layer = chunk.data.size // chunk.size[0]
                data = chunk.data.part(within * bytes_per_layer, bytes_per_layer)
                boxes.append((chunk.offset[1:], chunk.size[1:], data))
        return self._tile(self.shape[1:], boxes)

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


def read_distributed(files: Files, where: str) -> dict[str, Grid]:
    """The tensors of a distributed checkpoint folder (`metadata.json`, then zarr or torch_dist).

    Raises:
        CheckpointError: neither of the two; anything missing, cut or contradictory.
    """
    backend = "torch_dist" if ".metadata" in files else "zarr"
    if "metadata.json" in files:
        text = files["metadata.json"]
        require(text.size <= MAX_JSON_BYTES, f"{text}: too long")
        backend = str(parse_json(text.read(), text).get("sharded_backend", backend))
    require(backend in ("zarr", "torch_dist"), f"{where}: sharded_backend is {backend!r}, expected zarr or torch_dist")
    grids = read_zarr(files, where) if backend == "zarr" else read_torch_dist(files, where)
    require(grids, f"{where}: no tensors in this distributed checkpoint")
    return grids


def read_zarr(files: Files, where: str) -> dict[str, Grid]:
    """Zarr version 2 arrays, one folder each, without compression (as Megatron writes them)."""
    grids = {}
    for name, entry in files.items():
        folder, _, last = name.rpartition("/")
        if last == ".zarray" and "_extra_state" not in folder:
            require(len(grids) < MAX_TENSORS, f"{where}: more than {MAX_TENSORS:,} arrays")
            grids[folder.replace("/", ".")] = _zarr_array(folder, entry, files)
    return grids


def _zarr_array(folder: str, entry: ByteRange, files: Files) -> Grid:
    require(entry.size <= MAX_JSON_BYTES, f"{entry}: too long")
    header = parse_json(entry.read(), entry)
    require(header.get("zarr_format") == 2, f"{entry}: zarr_format {header.get('zarr_format')!r}, expected 2")
    plain = header.get("compressor") is None and not header.get("filters") and header.get("order", "C") == "C"
    require(plain, f"{entry}: compressed, filtered or column-major chunks, expected plain ones as Megatron writes them")
    label = str(header.get("dtype"))
    require(label in _ZARR_DTYPES, f"{entry}: dtype {label!r}, expected {list(_ZARR_DTYPES)}")
    dtype = _ZARR_DTYPES[label]
    shape, sizes = header.get("shape"), header.get("chunks")
    if not isinstance(shape, list) or not isinstance(sizes, list) or not len(shape) == len(sizes) > 0:
        raise CheckpointError(f"{entry}: shape {shape!r} and chunks {sizes!r}, expected two lists of one length")
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
    require(separator in (".", "/"), f"{entry}: dimension_separator {separator!r}, expected '.' or '/'")
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


def read_torch_dist(files: Files, where: str) -> dict[str, Grid]:
    """torch.distributed.checkpoint: `.metadata` says in which `.distcp` file, and where in it, each chunk lies."""
    require(".metadata" in files, f"{where}: no .metadata in it; expected a torch_dist checkpoint")
    entry = files[".metadata"]
    metadata = load_inert(entry.read(), entry)
    require(isinstance(metadata, Inert), f"{entry}: not the metadata of torch.distributed.checkpoint")
    tensors, storage = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        raise CheckpointError(f"{entry}: no state_dict_metadata or storage_data")
    require(len(tensors) <= MAX_TENSORS and len(storage) <= MAX_CHUNKS, f"{entry}: too many tensors")
    places = _places(storage, entry)
    grids = {}
    for name, described in tensors.items():
        if isinstance(name, str) and isinstance(described, Inert) and described.name.endswith(".TensorStorageMetadata"):
            grids[name] = _grid(name, described, places, files, entry)
    return grids


def _places(storage: dict[object, object], entry: ByteRange) -> dict[tuple[str, tuple[int, ...]], Inert]:
    places = {}
    for index, info in storage.items():
        if not (isinstance(index, Inert) and isinstance(info, Inert)):
            raise CheckpointError(f"{entry}: storage_data is not as expected")
        name, offset = index.get("fqn"), index.get("offset")
        if isinstance(name, str) and isinstance(offset, tuple):
            places[name, offset] = info
    return places


def _grid(
    name: str, described: Inert, places: dict[tuple[str, tuple[int, ...]], Inert], files: Files, entry: ByteRange
) -> Grid:
    properties, shape, boxes = described.get("properties"), described.get("size"), described.get("chunks")
    state = properties.state if isinstance(properties, Inert) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, dict):  # torch before 2.1 pickles the fields by name
        dtype = state.get("dtype")
    if not (isinstance(shape, tuple) and isinstance(boxes, list) and isinstance(dtype, torch.dtype)):
        raise CheckpointError(f"{entry}: {name}: no size, chunks or dtype")
    tensor_bytes(shape, dtype.itemsize, f"{entry}: {name}")
    chunks = []
    for box in boxes:
        offset, size = _box(box, shape, f"{entry}: {name}")
        require((name, offset) in places, f"{entry}: {name}: nothing says where chunk {offset} is stored")
        chunks.append(Chunk(offset, size, _chunk_bytes(places[name, offset], files, f"{entry}: {name}", size, dtype)))
    return Grid(name, shape, dtype, chunks)


def _box(box: object, shape: tuple[int, ...], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and size of a chunk that lies inside `shape`."""
    offset, size = (box.get("offsets"), box.get("sizes")) if isinstance(box, Inert) else (None, None)
    if isinstance(offset, tuple) and isinstance(size, tuple) and len(offset) == len(size) == len(shape):
        numbers = all(type(value) is int and value >= 0 for value in (*offset, *size))
        if numbers and all(o + s <= whole for o, s, whole in zip(offset, size, shape, strict=True)):
            return offset, size
    raise CheckpointError(f"{where}: chunk {str(offset)[:80]} {str(size)[:80]} does not lie in {list(shape)}")


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
    same = ref.size == size and ref.storage.dtype == dtype
    require(
        same,
        f"{record.data}: shape {list(ref.size)} and {ref.storage.dtype}, .metadata says {list(size)} and {dtype}",
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
