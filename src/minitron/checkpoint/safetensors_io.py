"""The safetensors file format: a checked header, tensors read lazily, files written as a stream.

Format (huggingface/safetensors): 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}},
then the data without gaps. The library's `save_file` wants all tensors of a file in memory, hence this writer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import new_file
from .limits import MAX_SAFETENSORS_HEADER_BYTES, MAX_TENSORS, parse_json, require, tensor_bytes
from .tensors import ByteRange, LazyTensor, ahead, from_bytes, raw, write_all

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's tensor entries (checked against the size of the file) and the offset of the data.

    Raises:
        CheckpointError: a cut file, a header that is too long or not JSON, offsets with gaps, overlaps or a size that
            is not that of shape and dtype, data shorter or longer than the header says.
    """
    data = ByteRange.whole(path)
    require(data.size >= 8, f"{path}: {data.size} bytes, too short for a safetensors file; it is cut")
    (length,) = struct.unpack("<Q", data.read(0, 8))
    limit = min(MAX_SAFETENSORS_HEADER_BYTES, data.size - 8)
    require(
        length <= limit,
        f"{path}: header length {length:,}, expected at most {limit:,}; the file is cut or not safetensors",
    )
    header = parse_json(data.read(8, length), f"{path} (header)")
    header.pop("__metadata__", None)
    require(len(header) <= MAX_TENSORS, f"{path}: {len(header):,} tensors, expected at most {MAX_TENSORS:,}")
    end = 0
    spans = sorted((_check_entry(name, entry, path) for name, entry in header.items()), key=lambda span: span[:2])
    for start, stop, name in spans:
        require(start == end, f"{path}: {name}: data starts at {start:,}, expected {end:,}; the header is corrupted")
        end = stop
    actual = data.size - 8 - length
    require(
        end == actual, f"{path}: {actual:,} bytes of data, the header says {end:,}; the file is cut or not complete"
    )
    return header, 8 + length


def _check_entry(name: str, entry: Any, path: Path) -> tuple[int, int, str]:
    require(isinstance(entry, dict), f"{path}: {name}: found {type(entry).__name__}, expected dtype, shape and offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    require(
        isinstance(dtype, str) and dtype in DTYPES, f"{path}: {name}: dtype {dtype!r}, expected one of {list(DTYPES)}"
    )
    require(isinstance(shape, list), f"{path}: {name}: shape {shape!r}, expected a list")
    size = tensor_bytes(tuple(shape), DTYPES[dtype].itemsize, f"{path}: {name}")
    good = isinstance(offsets, list) and len(offsets) == 2 and all(type(value) is int for value in offsets)
    require(good, f"{path}: {name}: data_offsets {offsets!r}, expected [start, end]")
    start, stop = offsets
    require(
        0 <= start <= stop and stop - start == size,
        f"{path}: {name}: data_offsets [{start}, {stop}] hold {stop - start:,} bytes, "
        f"expected {size:,} for {dtype} {shape}",
    )
    return start, stop, name


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, none of them read yet.

    Raises:
        CheckpointError: see `read_header`.
    """
    header, base = read_header(path)
    data = ByteRange.whole(path)
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        part = data.part(base + start, stop - start, f"{path} ({name})")
        tensors[name] = from_bytes(part, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write `tensors` to one file, block by block, under a temporary name that is renamed at the end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path, overwrite=True) as draft, draft.open("wb", buffering=0) as file:
        write_all(file, struct.pack("<Q", len(text)) + text)
        for block in ahead(block for tensor in tensors.values() for block in tensor.blocks()):
            write_all(file, raw(block))
