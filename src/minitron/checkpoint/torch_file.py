"""Files of `torch.save`: their tensors read lazily without torch.load, and one-tensor files written as a stream.

Such a file is an uncompressed zip: `data.pkl` with the structure, `data/<key>` with the bytes of each storage. It may
stand alone (`model_weights.ckpt`), inside a tar, or as one of many records in a `.distcp` file.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch._utils import _rebuild_tensor_v2

from .limits import (
    MAX_ARCHIVE_MEMBERS,
    MAX_PICKLE_BYTES,
    MAX_SHARING,
    MAX_TENSORS,
    MIB,
    CheckpointError,
    require,
    tensor_bytes,
)
from .pickles import STORAGES, StorageRef, TensorRef, load_inert
from .tensors import ByteRange, LazyTensor, ahead, from_bytes, raw, write_all

_MAX_DIRECTORY_BYTES = 32 * MIB
_LOCAL_HEADER_BYTES = 30


class TorchFile:
    """A `torch.save` archive in a range of bytes.

    Raises:
        CheckpointError: not such an archive; compressed or encrypted members; another byte order; a pickle that
            names code.
    """

    def __init__(self, data: ByteRange) -> None:
        self.data = data
        self._members = _zip_members(data)
        self._claimed = 0
        pickles = [name for name in self._members if name.split("/")[-1] == "data.pkl"]
        require(len(pickles) == 1, f"{data}: {len(pickles)} members named data.pkl, expected one; not a torch file")
        self._prefix = pickles[0].removesuffix("data.pkl")
        order = self._member(f"{self._prefix}byteorder")
        require(order is None or order.read(0, min(order.size, 8)) == b"little", f"{data}: not in little-endian order")
        structure = self._member(pickles[0])
        assert structure is not None
        require(structure.size <= MAX_PICKLE_BYTES, f"{structure}: {structure.size:,} bytes, too long for a structure")
        self.value = load_inert(structure.read(), structure)

    def tensor(self, ref: TensorRef, name: str = "a tensor") -> LazyTensor:
        """A tensor of the file, not read yet; `name` is for errors.

        Raises:
            CheckpointError: a dtype that is not supported; its storage is missing, shorter than the tensor, or has
                fewer values than the tensor (repeated ones); all tensors together claim many times the file's size.
        """
        storage, dtype = self._storage(ref.storage), self._dtype(ref, name)
        items = tensor_bytes(ref.size, 1, f"{self.data}: {name}")
        # Strides of 0, or overlapping rows, would make a few bytes a tensor of any size.
        if items * dtype.itemsize > storage.size and items <= _reach(ref.size, ref.stride):
            raise CheckpointError(
                f"{storage}: {storage.size:,} bytes, its tensor {name} needs {items * dtype.itemsize:,}; "
                "the file is cut"
            )
        if items * dtype.itemsize > storage.size:
            raise CheckpointError(
                f"{storage}: {name} has {items:,} values by its size {list(ref.size)} and stride {list(ref.stride)}, "
                f"more than its storage of {storage.size:,} bytes; save it with contiguous() first"
            )
        self._claimed += items * dtype.itemsize
        if self._claimed > MAX_SHARING * self.data.size:
            raise CheckpointError(
                f"{self.data}: its tensors share storages and claim more than {MAX_SHARING} times its "
                f"{self.data.size:,} bytes; save them apart (clone())"
            )
        if self._is_row_major(ref):
            width = dtype.itemsize
            return from_bytes(storage.part(ref.offset * width, items * width), ref.size, dtype)
        self._span(ref, storage, dtype)
        return _strided(ref, storage, dtype)

    def contiguous(self, ref: TensorRef) -> ByteRange | None:
        """The bytes of a row-major tensor; None for one that is not."""
        if not self._is_row_major(ref):
            return None
        width = self._dtype(ref, "a tensor").itemsize
        items = tensor_bytes(ref.size, 1, self.data)
        return self._storage(ref.storage).part(ref.offset * width, items * width)

    def _dtype(self, ref: TensorRef, name: str) -> torch.dtype:
        if ref.dtype is None:
            raise CheckpointError(
                f"{self.data}: {name} has a {ref.storage.kind}, expected numbers of a dtype known here"
            )
        return ref.dtype

    @staticmethod
    def _is_row_major(ref: TensorRef) -> bool:
        expected, items = [], 1
        for size in reversed(ref.size):
            expected.append(items)
            items *= size
        return all(
            have == want or size == 1 for have, want, size in zip(ref.stride, reversed(expected), ref.size, strict=True)
        )

    def _member(self, name: str) -> ByteRange | None:
        """A member's bytes. Its local header is looked at here, so that a long directory costs nothing in itself."""
        info = self._members.get(name)
        if info is None:
            return None
        header = self.data.part(info.header_offset, _LOCAL_HEADER_BYTES).read()
        good = header[:4] == b"PK\x03\x04"
        require(good, f"{self.data}: {name[:80]} is not where the zip directory says; corrupted")
        start = info.header_offset + _LOCAL_HEADER_BYTES
        start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return self.data.part(start, info.file_size, f"{self.data} ({name[:200]})")

    def _storage(self, ref: StorageRef) -> ByteRange:
        found = self._member(f"{self._prefix}data/{ref.key}")
        if found is None:
            raise CheckpointError(f"{self.data}: storage {ref.key!r} is missing")
        return found

    def _span(self, ref: TensorRef, storage: ByteRange, dtype: torch.dtype) -> None:
        end = (ref.offset + _reach(ref.size, ref.stride)) * dtype.itemsize
        require(end <= storage.size, f"{storage}: {storage.size:,} bytes, its tensor needs {end:,}; the file is cut")


def _strided(ref: TensorRef, storage: ByteRange, dtype: torch.dtype) -> LazyTensor:
    """A tensor that is not row-major (a transposed one, say), through a mapping of its storage.

    A few rows of it may lie all over the storage, so reading them as one span would read everything again and again.
    """
    reach = _reach(ref.size, ref.stride)

    def rows(start: int, stop: int) -> torch.Tensor:
        size = (stop - start, *ref.size[1:])
        if 0 in size:
            return torch.empty(size, dtype=dtype)
        place = storage.offset + ref.offset * dtype.itemsize
        mapped = np.memmap(storage.path, np.uint8, mode="c", offset=place, shape=(reach * dtype.itemsize,))
        return torch.from_numpy(mapped).view(dtype).as_strided(size, ref.stride, start * ref.stride[0]).clone()

    return LazyTensor(ref.size, dtype, rows)


def _reach(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Items from the first to the last one of a strided tensor, both counted."""
    if 0 in size:
        return 0
    return 1 + sum((count - 1) * step for count, step in zip(size, stride, strict=True))


class _Window(io.RawIOBase):
    """A range of bytes as a file, for zipfile; refuses reads that only a corrupted directory asks for."""

    def __init__(self, data: ByteRange) -> None:
        self._data, self._at = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._data.size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._data.size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        require(size <= _MAX_DIRECTORY_BYTES, f"{self._data}: its zip directory is too long; the file is corrupted")
        data = self._data.read(self._at, size)
        self._at += size
        # zipfile makes an object of each entry before it can be asked how many there are.
        entries = data.count(b"PK\x01\x02")
        most = MAX_ARCHIVE_MEMBERS
        require(entries <= most, f"{self._data}: {entries:,} members, expected at most {most:,}")
        return data


def _zip_members(data: ByteRange) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(cast("BinaryIO", _Window(data))) as archive:
            infos = archive.infolist()
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many kinds on corrupted input; all mean the same
        raise CheckpointError(
            f"{data}: not a torch file, or cut ({error}); files of torch before 1.6 must be saved anew with torch"
        ) from None
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename
        plain = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not plain or info.flag_bits & 1:
            raise CheckpointError(f"{data}: {name[:80]} is compressed or encrypted; torch.save never does")
        if name in members:
            raise CheckpointError(f"{data}: {name[:80]} appears twice")
        members[name] = info
    return members


class _Shifted(io.RawIOBase):
    """The end of a growing file as a file of its own, for zipfile."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._base = file, file.tell()

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + self._base if whence == 0 else offset, whence) - self._base

    def tell(self) -> int:
        return self._file.tell() - self._base

    def flush(self) -> None:
        self._file.flush()


_ALIGNMENT = 64
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}


def write_tensor_record(file: BinaryIO, tensor: LazyTensor, shape: tuple[int, ...] = ()) -> int:
    """Append what `torch.save(tensor.view(shape))` would write, block by block, and return its length in bytes."""
    structure = _tensor_pickle(shape or tensor.shape, tensor.dtype)
    start = file.tell()
    with zipfile.ZipFile(cast("BinaryIO", _Shifted(file)), "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_info("archive/data.pkl"), structure)
        archive.writestr(_info("archive/.format_version"), b"1")
        archive.writestr(_info("archive/.storage_alignment"), str(_ALIGNMENT).encode())
        archive.writestr(_info("archive/byteorder"), b"little")
        info = _info("archive/data/0")
        info.file_size = tensor.nbytes
        # torch aligns storages by an extra field of filling, so that they can be mapped.
        header = _LOCAL_HEADER_BYTES + len(info.filename) + (20 if tensor.nbytes > zipfile.ZIP64_LIMIT else 0)
        filling = -(file.tell() - start + header + 4) % _ALIGNMENT
        info.extra = b"FB" + filling.to_bytes(2, "little") + b"Z" * filling
        with archive.open(info, "w", force_zip64=tensor.nbytes > zipfile.ZIP64_LIMIT) as member:
            for block in ahead(tensor.blocks()):
                write_all(cast("BinaryIO", member), raw(block))
        archive.writestr(_info("archive/version"), b"3\n")
    file.seek(0, io.SEEK_END)
    return file.tell() - start


def write_object_record(file: BinaryIO, value: Any) -> int:
    """Append `torch.save(value)` for a small value without tensors, and return its length in bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return file.write(buffer.getvalue())


def _info(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


class _Reference:
    """Pickled as a persistent id."""

    def __init__(self, value: tuple[Any, ...]) -> None:
        self.value = value


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.value if isinstance(obj, _Reference) else None


def _tensor_pickle(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The `data.pkl` of a one-tensor file; the storage is named, not held."""
    items, stride = 1, []
    for size in reversed(shape):
        stride.append(items)
        items *= size
    reference = _Reference(("storage", getattr(torch, _STORAGE_NAMES[dtype]), "0", "cpu", items))
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(_Rebuild((reference, 0, tuple(shape), tuple(reversed(stride)), False)))
    return buffer.getvalue()


class _Rebuild:
    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self._arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, (*self._arguments, OrderedDict())


_CONTAINERS = ("state_dict", "model", "module")
_CHUNK = re.compile(r"model_?(\d{1,3})")


def state_dict_of(file: TorchFile) -> Iterator[tuple[str, LazyTensor]]:
    """Names and tensors of the state dict in a torch file; values that are not tensors are skipped.

    Accepts the dict itself, or one under `state_dict` (Lightning), `model` (Megatron-LM) or `module` (DeepSpeed).
    """
    yield from state_dicts_of(file)[0].items()


def state_dicts_of(file: TorchFile) -> list[dict[str, LazyTensor]]:
    """The same, one dict for each virtual pipeline stage: under `model0`, `model1`, ... (NeMo: `model_0`) if any.

    Raises:
        CheckpointError: not a state dict; stages that are not numbered from 0 without a gap.
    """
    value = file.value
    for key in _CONTAINERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    require(isinstance(value, dict), f"{file.data}: holds {type(value).__name__}, expected a state dict")
    chunks: dict[int, dict[Any, Any]] = {}
    for key, item in value.items():
        match = _CHUNK.fullmatch(key) if isinstance(key, str) and isinstance(item, dict) else None
        if match:
            chunks[int(match[1])] = item
    whole = sorted(chunks) == list(range(len(chunks)))
    require(whole, f"{file.data}: virtual stages {sorted(chunks)}, expected them from 0 without a gap")
    stages = [chunks[number] for number in sorted(chunks)] or [value]
    count = sum(map(len, stages))
    require(count <= MAX_TENSORS, f"{file.data}: {count:,} entries, expected at most {MAX_TENSORS:,} tensors")
    return [
        {
            name: file.tensor(item, name)
            for name, item in stage.items()
            if isinstance(name, str) and isinstance(item, TensorRef)
        }
        for stage in stages
    ]
