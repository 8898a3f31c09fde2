"""Read pickles as data: no class or function that a file names is ever looked up or called.

A name in a pickle becomes either one of the few functions of this file or an inert record that only stores its
arguments. Names outside the known modules are refused. Used for torch files (`data.pkl`) and for `.metadata` of
torch.distributed.checkpoint. The opcodes are carried out by `pickle_machine.py`, within limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .limits import MAX_PICKLE_BYTES, MAX_RANK, CheckpointError, require, shown
from .pickle_machine import Inert, Machine, Name

__all__ = ["STORAGES", "Inert", "StorageRef", "TensorRef", "load_inert"]

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    )
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Modules whose names occur in checkpoints and become inert records.
_KNOWN_MODULES = ("torch", "megatron", "nemo", "transformer_engine", "numpy", "pathlib", "lightning", "omegaconf")
_KNOWN_NAMES = {("_io", "BytesIO"), ("argparse", "Namespace")}
_MODULES_OF_CODE = ("torch.hub", "torch.package", "torch._dynamo", "torch.utils.cpp_extension", "numpy.testing")


@dataclass(frozen=True)
class StorageRef:
    """A storage that a torch pickle refers to: which archive member, of what kind (`FloatStorage`, ...)."""

    key: str
    kind: str


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a torch pickle: a strided view of a storage. `dtype` is None for one that is not supported."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None


def load_inert(data: bytes, where: object) -> Any:
    """The object in a pickle, made of plain values, `TensorRef`s and inert records.

    Raises:
        CheckpointError: too long, cut or corrupted; a name that has no place in a checkpoint; opcodes that could
            exhaust memory or time.
    """
    require(
        len(data) <= MAX_PICKLE_BYTES, f"{where}: {len(data):,} bytes of pickle, expected at most {MAX_PICKLE_BYTES:,}"
    )
    try:
        return _Reader(data, where).machine.run()
    except CheckpointError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a pickle can fail in any way; to the user all mean the same
        raise CheckpointError(f"{where}: corrupted or cut pickle ({type(error).__name__}: {error})") from None


class _Reader:
    """What names, calls and persistent ids of one pickle mean."""

    def __init__(self, data: bytes, where: object) -> None:
        self._where = where
        self.machine = Machine(data, where, self._lookup, self._call, self._storage)

    def _lookup(self, name: Name) -> Any:
        key = (name.module, name.name)
        if name.module == "torch" and name.name in _DTYPES:
            return _DTYPES[name.name]
        root = name.module.split(".")[0]
        known = (
            key in _FUNCTIONS
            or key in _KNOWN_NAMES
            or (root in _KNOWN_MODULES and not name.module.startswith(_MODULES_OF_CODE))
        )
        require(known, f"{self._where}: the pickle names {name}; refused, nothing of it was run")
        return name

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if not isinstance(function, Name):
            raise CheckpointError(f"{self._where}: the pickle calls {shown(function)}; refused")
        known = _FUNCTIONS.get((function.module, function.name))
        return known(self.machine, *arguments) if known else Inert(str(function), arguments)

    def _storage(self, pid: Any) -> StorageRef:
        kind, storage, key = pid[:3] if isinstance(pid, tuple) and len(pid) >= 3 else (None, None, None)
        if kind != "storage" or not isinstance(key, str) or not isinstance(storage, Name):
            raise CheckpointError(f"{self._where}: unknown kind of storage in a torch file")
        return StorageRef(key, storage.name)


def _rebuild_tensor(_: Machine, storage: Any, offset: Any, size: Any, stride: Any, *__: Any) -> TensorRef:
    dtype = STORAGES.get(storage.kind) if isinstance(storage, StorageRef) else None
    return _tensor(storage, offset, size, stride, dtype)


def _rebuild_tensor_v3(
    _: Machine, storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *__: Any
) -> TensorRef:
    """What torch saves for dtypes without a storage class of their own: float8, unsigned integers."""
    return _tensor(storage, offset, size, stride, dtype if isinstance(dtype, torch.dtype) else None)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None) -> TensorRef:
    plain = isinstance(offset, int) and isinstance(size, tuple) and isinstance(stride, tuple)
    # The length first: a pickle can pass one long tuple to any number of tensors.
    short = plain and len(size) == len(stride) <= MAX_RANK
    numbers = short and all(type(value) is int and 0 <= value < 1 << 60 for value in (offset, *size, *stride))
    require(
        isinstance(storage, StorageRef) and numbers, "a tensor in a torch file has an impossible offset, size or stride"
    )
    return TensorRef(storage, offset, size, stride, dtype)


def _encode(machine: Machine, text: Any, encoding: Any) -> bytes:
    require(isinstance(text, str) and encoding == "latin1", "bytes in a pickle are encoded in an unknown way")
    machine.spend(len(text) + 48)
    return text.encode("latin1")


def _size(_: Machine, values: Any = ()) -> tuple[Any, ...]:
    require(isinstance(values, tuple | list) and len(values) <= 64, "a size in a torch file has too many dimensions")
    return tuple(values)


def _ordered_dict(machine: Machine, pairs: Any = ()) -> dict[Any, Any]:
    good = isinstance(pairs, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    require(good, "an OrderedDict in a pickle is built in an unknown way")
    result: dict[Any, Any] = {}
    machine.store(result, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return result


def _from_type(machine: Machine, function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    known = _FUNCTIONS.get((function.module, function.name)) if isinstance(function, Name) else None
    good = known in (_rebuild_tensor, _rebuild_tensor_v3) and isinstance(arguments, tuple)
    if known is None or not good:
        raise CheckpointError("a tensor subclass in a torch file is rebuilt in an unknown way")
    return known(machine, *arguments)


def _set(machine: Machine, items: Any = ()) -> Inert:
    require(isinstance(items, list | tuple | Inert), "a set in a pickle is built in an unknown way")
    machine.check_items(items if isinstance(items, list | tuple) else ())
    return Inert("builtins.set", ())


def _parameter(_: Machine, tensor: Any, *__: Any) -> Any:
    return tensor


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
}
