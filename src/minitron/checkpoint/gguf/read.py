"""GGUF files of llama.cpp, read lazily: a checked header, tensors dequantized a block of rows at a time.

The `gguf` package dequantizes; its reader is not used, since it maps the whole file and trusts every count in the
header. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from minitron.families import EMBEDDING, Family
from minitron.shapes import Shape, describe

from ..hf import check_shapes, config_from, generation_config
from ..limits import MAX_TENSORS, CheckpointError, collector_paused, require, shown, tensor_bytes
from ..names import gguf_to_hf, is_norm_weight
from ..tensors import ByteRange, Checkpoint, LazyTensor, from_bytes
from .rotary_rows import INTERLEAVED, half_split, is_rotated
from .settings import config_values, family_in
from .vocab import add_tokenizer

MAX_KEYS = 100_000
MAX_TEXT_BYTES = 40 << 20
"""The longest string is a whole tokenizer.json, kept for the way back."""
_MAX_TEXTS = 1_500_000
"""A vocabulary of 256,000 tokens comes with 500,000 merges."""
_MAX_MEMORY = 200 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
_MAX_ARRAY_DEPTH = 2
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
MAX_SPLITS = 10_000
_SPLIT_NAME = re.compile(r"(.+)-(?:\d{5})-of-(\d{5})\.gguf")
_MAX_FACTOR_BYTES = 1 << 16


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as stored in the file: shape (rows first), ggml's type number, bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: ByteRange


@dataclass(frozen=True)
class GGUFFile:
    """Keys and tensors of a GGUF file."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Reader:
    """Reads the header from start to end: every length is checked against the rest of the file, every value against a
    budget.

    Python's objects take more than the bytes they come from (a text of no characters 8 bytes in the file and in the
    list, a float 4 and 32), so values are counted as they are made.
    """

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self._path, self._left = file, path, size
        self._memory, self._texts = _MAX_MEMORY, _MAX_TEXTS

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self._left:
            raise CheckpointError(
                f"{self._path}: the header asks for {count:,} bytes, {self._left:,} are left; cut or corrupted"
            )
        self._left -= count
        return self._file.read(count)

    def number(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def spend(self, amount: int) -> None:
        self._memory -= amount
        if self._memory < 0:
            raise CheckpointError(f"{self._path}: the values of its header would take more than {_MAX_MEMORY:,} bytes")

    def text(self) -> str:
        length = int.from_bytes(self.take(8), "little")
        if length > MAX_TEXT_BYTES:
            raise CheckpointError(f"{self._path}: a text of {length:,} bytes in the header; corrupted")
        self._texts -= 1
        if self._texts < 0:
            raise CheckpointError(f"{self._path}: more than {_MAX_TEXTS:,} texts in its header")
        data = self.take(length)
        # CPython stores up to four bytes for each character of a text that is not plain ASCII.
        self.spend(64 + length * (1 if data.isascii() else 4))
        # Pieces of byte-level vocabularies need not be UTF-8.
        return data.decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        require(
            kind == _ARRAY and depth < _MAX_ARRAY_DEPTH, f"{self._path}: value type {kind} in the header; corrupted"
        )
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[item])
            require(count <= self._left, f"{self._path}: an array of {count:,} values in the header; corrupted")
            self.spend(40 * count)
            return np.frombuffer(self.take(count * width), dtype=np.dtype("<" + _SCALARS[item])).tolist()
        # Each text takes 8 bytes at least, so a count that cannot fit is known before anything is built.
        require(count * 8 <= self._left, f"{self._path}: an array of {count:,} texts in the header; corrupted")
        if item == _ARRAY:
            self.spend(200 * count)
        return [self.value(item, depth + 1) for _ in range(count)]


def read_gguf(path: Path) -> GGUFFile:
    """The header of a GGUF file.

    Raises:
        CheckpointError: not GGUF, version 1, big-endian; cut or corrupted; tensors outside the file.
    """
    whole = ByteRange.whole(path)
    with path.open("rb") as file, collector_paused():
        reader = _Reader(file, path, whole.size)
        require(whole.size >= 24 and reader.take(4) == b"GGUF", f"{path}: does not begin with GGUF; not a GGUF file")
        version = reader.number("I")
        require(version in (2, 3), f"{path}: GGUF version {version}, expected 2 or 3 in little-endian order")
        tensors, keys = reader.number("Q"), reader.number("Q")
        require(tensors <= MAX_TENSORS and keys <= MAX_KEYS, f"{path}: {tensors:,} tensors, {keys:,} keys; corrupted")
        require(24 * tensors + 13 * keys <= whole.size, f"{path}: too short for {tensors:,} tensors and {keys:,} keys")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = reader.text()
            if key in values:
                raise CheckpointError(f"{path}: the key {key[:80]!r} appears twice")
            values[key] = reader.value(reader.number("I"))
        infos = [_tensor_info(reader, path) for _ in range(tensors)]
        alignment = values.get("general.alignment", 32)
        good = type(alignment) is int and 0 < alignment <= 1 << 20 and alignment % 8 == 0
        require(good, f"{path}: general.alignment is {shown(alignment)}, expected a multiple of 8")
        start = file.tell() + -file.tell() % alignment
    found: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in infos:
        if name in found:
            raise CheckpointError(f"{path}: tensor {name[:80]} appears twice")
        size = _bytes_of(shape, kind, f"{path}: {name[:80]}")
        found[name] = GGUFTensor(name, shape, kind, whole.part(start + offset, size, f"{path} ({name[:80]})"))
    end, before = start, ""
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.data.offset, tensor.data.size)):
        if tensor.data.offset < end:
            raise CheckpointError(f"{path}: {tensor.name[:80]} overlaps {before[:80] or 'the header'}; corrupted")
        end, before = tensor.data.offset + tensor.data.size, tensor.name
    return GGUFFile(path, values, found)


def read_gguf_parts(path: Path) -> GGUFFile:
    """A GGUF file, together with its other parts if it is one of NAME-00001-of-0000N.gguf; any part may be named.

    Raises:
        CheckpointError: see `read_gguf`; a part that is missing, out of order, or of another split.
    """
    file = read_gguf(path)
    count = file.keys.get("split.count", 1)
    whole = type(count) is int and 0 <= count <= MAX_SPLITS
    require(whole, f"{path}: split.count is {shown(count)}, expected a number up to {MAX_SPLITS}")
    if count <= 1:
        return file
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[2]) != count:
        raise CheckpointError(f"{path}: one of {count} parts, expected a name like MODEL-00001-of-{count:05d}.gguf")
    keys: dict[str, Any] = {}
    tensors: dict[str, GGUFTensor] = {}
    for number in range(count):
        place = path.with_name(f"{match[1]}-{number + 1:05d}-of-{count:05d}.gguf")
        require(place.is_file(), f"{place}: no such file; part {number + 1} of {count} of {path.name} is missing")
        part = read_gguf(place)
        told = (part.keys.get("split.no"), part.keys.get("split.count"))
        require(
            told == (number, count), f"{place}: split.no and split.count are {shown(told)}, expected {(number, count)}"
        )
        keys = keys or part.keys  # the first part has the keys of the model
        twice = sorted(tensors.keys() & part.tensors.keys())
        require(not twice, f"{place}: tensor {twice[:1]} stands in another part, too")
        tensors |= part.tensors
    expected = keys.get("split.tensors.count", len(tensors))
    require(len(tensors) == expected, f"{path}: {len(tensors)} tensors in {count} parts, expected {shown(expected)}")
    return GGUFFile(path, keys, tensors)


def _tensor_info(reader: _Reader, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = reader.text(), reader.number("I")
    if rank > 4:
        raise CheckpointError(f"{path}: {name[:80]} has {rank} dimensions, ggml has at most 4")
    shape = tuple(reversed([reader.number("Q") for _ in range(rank)]))
    return name, shape, reader.number("I"), reader.number("Q")


def _block(kind: int, where: str) -> tuple[int, int]:
    """Values and bytes of a quantization block."""
    gguf = _gguf()
    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise CheckpointError(f"{where}: ggml type {kind}, unknown to the gguf package") from None


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError("GGUF files need the gguf package: pip install 'minitron[gguf]'") from None
    return gguf


def _bytes_of(shape: tuple[int, ...], kind: int, where: str) -> int:
    values, size = _block(kind, where)
    count = tensor_bytes(shape, 1, where)
    require(shape and shape[-1] % values == 0, f"{where}: rows of {shape[-1:]} values, expected a multiple of {values}")
    return count // values * size


def lazy(tensor: GGUFTensor) -> LazyTensor:
    """A tensor of the file as numbers; quantized ones come out as float32.

    Raises:
        CheckpointError: a quantization that the gguf package cannot undo.
    """
    if tensor.kind in _PLAIN:
        return from_bytes(tensor.data, tensor.shape, _PLAIN[tensor.kind])
    gguf = _gguf()
    kind = gguf.GGMLQuantizationType(tensor.kind)
    require(kind in gguf.quants._type_traits, f"{tensor.data}: the gguf package cannot dequantize {kind.name}")
    row_bytes = _bytes_of(tensor.shape[-1:], tensor.kind, str(tensor.data))
    raw = from_bytes(tensor.data, (*tensor.shape[:-1], row_bytes), torch.uint8)

    def rows(start: int, stop: int) -> torch.Tensor:
        if start == stop:
            return torch.empty((0, *tensor.shape[1:]))
        return torch.from_numpy(gguf.quants.dequantize(raw.rows(start, stop).numpy(), kind))

    return LazyTensor(tensor.shape, torch.float32, rows)


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file under Hugging Face names, with its tokenizer as `tokenizer.json`; Nemotron's norms as gamma - 1.

    Raises:
        CheckpointError: another architecture; a truncated or corrupted file; missing keys or tensors.
    """
    file = read_gguf_parts(path)
    family = family_in(file.keys, path)
    factors = _rope_factors(file, family)
    tensors = {gguf_to_hf(n): lazy(tensor) for n, tensor in file.tensors.items() if n not in _ROPE_FACTORS}
    require(f"{EMBEDDING.name}.weight" in tensors, f"{path}: no token_embd.weight in it")
    rows = tensors[f"{EMBEDDING.name}.weight"].shape[0]
    config = config_from(config_values(file.keys, family, rows, tensors, factors, path), path)
    main = tensors[f"{EMBEDDING.name}.weight"].dtype
    matrices = [
        tensor for name, tensor in tensors.items() if name.startswith("model.layers.") and len(tensor.shape) == 2
    ]
    if matrices:
        main = matrices[0].dtype
    config.dtype = main
    shape = describe(config)
    ordered: dict[str, LazyTensor] = {}
    for name, expected in shape.tensor_shapes.items():
        require(name in tensors, f"{path}: no tensor for {name}")
        ordered[name] = _as_stored_by_hf(name, tensors[name], expected, shape).to(main)
    extra = sorted(tensors.keys() - ordered.keys() - {"lm_head.weight"})
    require(not extra, f"{path}: a tensor for {extra[:1]}, which {family.architecture} does not have")
    check_shapes(config, ordered, path)
    checkpoint = Checkpoint(config, ordered)
    quantized = sorted({_kind_name(t.kind) for t in file.tensors.values() if t.kind not in _PLAIN})
    if quantized:
        checkpoint.notes.append(
            f"dequantized from {', '.join(quantized)}: the precision that quantization lost is not restored"
        )
    checkpoint.texts["generation_config.json"] = generation_config(config)
    add_tokenizer(checkpoint, file.keys)
    return checkpoint


def _as_stored_by_hf(name: str, tensor: LazyTensor, expected: tuple[int, ...], shape: Shape) -> LazyTensor:
    if shape.family.norm.offset and is_norm_weight(name):
        return _minus_one(tensor)
    if shape.family.gguf in INTERLEAVED and is_rotated(name) and tensor.shape == expected:
        return half_split(tensor, shape.head_dim)
    return tensor


def _rope_factors(file: GGUFFile, family: Family) -> list[float] | None:
    """The factors of `rope_freqs.weight` where they scale anything."""
    found = None
    for name in _ROPE_FACTORS:
        if name not in file.tensors:
            continue
        tensor = file.tensors[name]
        values = lazy(tensor).load().float() if tensor.data.size <= _MAX_FACTOR_BYTES else None
        if values is not None and bool((values == 1).all()):
            continue
        known = name == _ROPE_FACTORS[0] and family.gguf != "nemotron" and values is not None
        require(known, f"{file.path}: {name} (RoPE factors per frequency): llama.cpp's {family.title} has none, and "
                "which scaling they stand for is not told")  # fmt: skip
        assert values is not None
        found = values.tolist()
    return found


def _kind_name(kind: int) -> str:
    return _gguf().GGMLQuantizationType(kind).name


def _minus_one(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape, torch.float32, lambda start, stop: tensor.rows(start, stop).float() - 1)
