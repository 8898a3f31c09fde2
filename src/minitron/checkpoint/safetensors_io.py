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
from .limits import MAX_SAFETENSORS_HEADER_BYTES, MAX_TENSORS, CheckpointError, parse_json, require, shown, tensor_bytes
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
    about = header.pop("__metadata__", None)
    texts = about is None or (isinstance(about, dict) and all(isinstance(text, str) for text in about.values()))
    require(texts, f"{path}: __metadata__ is {shown(about)}, expected a map from text to text")
    kind = about.get("format") if about else None
    require(
        kind not in ("tf", "flax"), f"{path}: __metadata__ says format {kind!r}, expected tensors of PyTorch ('pt')"
    )
    require(len(header) <= MAX_TENSORS, f"{path}: {len(header):,} tensors, expected at most {MAX_TENSORS:,}")
    end = 0
    spans = sorted(_check_entry(name, entry, path) for name, entry in header.items())
    for start, stop, name in spans:
        if start != end:
            raise CheckpointError(
                f"{path}: {name}: data starts at {start:,}, expected {end:,}; the header is corrupted"
            )
        end = stop
    actual = data.size - 8 - length
    require(
        end == actual, f"{path}: {actual:,} bytes of data, the header says {end:,}; the file is cut or not complete"
    )
    return header, 8 + length


def _check_entry(name: str, entry: Any, path: Path) -> tuple[int, int, str]:
    # Sentences are made only when they are needed: a header may have a hundred thousand entries.
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: {name}: found {type(entry).__name__}, expected dtype, shape and offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name}: dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list):
        raise CheckpointError(f"{path}: {name}: shape {shown(shape)}, expected a list")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(value) is int for value in offsets):
        raise CheckpointError(f"{path}: {name}: data_offsets {shown(offsets)}, expected [start, end]")
    size = tensor_bytes(tuple(shape), DTYPES[dtype].itemsize, name)
    start, stop = offsets
    if not 0 <= start <= stop or stop - start != size:
        raise CheckpointError(
            f"{path}: {name}: data_offsets [{start}, {stop}] hold {stop - start:,} bytes, "
            f"expected {size:,} for {dtype} {shape}"
        )
    return start, stop, name


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, none of them read yet.

    Raises:
        CheckpointError: see `read_header`.
    """
    header, base = read_header(path)
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        part = ByteRange(path, base + start, stop - start, f"{path} ({name})")  # inside the file: see `read_header`
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
