"""Pickles, read as data: no class or function that a file names is ever looked up, let alone called.

A name in a pickle becomes either one of the few functions of this file or an inert record that only remembers what
it was given. Names outside the known modules are refused. Used for torch files (`data.pkl`) and for `.metadata` of
torch.distributed.checkpoint.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .limits import MAX_PICKLE_BYTES, CheckpointError, require

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
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
# Modules whose names are met in checkpoints and may stand as inert records.
_KNOWN_MODULES = ("torch", "megatron", "nemo", "transformer_engine", "numpy", "pathlib", "lightning", "omegaconf")
_KNOWN_NAMES = {("_io", "BytesIO"), ("builtins", "set"), ("__builtin__", "set"), ("argparse", "Namespace")}
_MODULES_OF_CODE = ("torch.hub", "torch.package", "torch._dynamo", "torch.utils.cpp_extension", "numpy.testing")
_REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}


class Inert:
    """What stands for an object of a class that is not looked up: its name, its arguments, its state."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:  # noqa: D102 (the class says it)
        self = super().__new__(cls)
        self.args, self.state = args, {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Items of list-like objects are not kept."""

    def extend(self, values: Any) -> None:
        """Items of list-like objects are not kept."""

    def get(self, field: str) -> Any:
        """A field of the object's state; None if it has none."""
        return self.state.get(field) if isinstance(self.state, dict) else None


@dataclass(frozen=True)
class StorageRef:
    """A storage that a torch pickle refers to: which archive member, of what dtype."""

    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a torch pickle: a strided view of a storage."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def load_inert(data: bytes, where: object) -> Any:
    """The object in a pickle, made of plain values, `TensorRef`s and inert records.

    Raises:
        CheckpointError: too long, cut or corrupted; a name that has no place in a checkpoint; opcodes that could
            exhaust memory.
    """
    require(
        len(data) <= MAX_PICKLE_BYTES, f"{where}: {len(data):,} bytes of pickle, expected at most {MAX_PICKLE_BYTES:,}"
    )
    _scan(data, where)
    try:
        return _Unpickler(data, where).load()
    except CheckpointError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a pickle can fail in any way at all; each means the same to the user
        raise CheckpointError(f"{where}: corrupted pickle ({type(error).__name__}: {error})") from None


def _scan(data: bytes, where: object) -> None:
    """Walk through the opcodes before anything is built: lengths must fit, memo indices must be dense."""
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(data):
            count += 1
            require(opcode.name not in _REFUSED_OPCODES, f"{where}: pickle opcode {opcode.name} is not accepted")
            # The C unpickler allocates its memo up to the largest index that it is told.
            if opcode.name in ("PUT", "LONG_BINPUT"):
                index = int(argument or 0)
                require(index <= count, f"{where}: pickle memo index {index:,} after {count:,} opcodes")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{where}: corrupted or cut pickle ({error})") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: object) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._classes: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in _FUNCTIONS:
            return _FUNCTIONS[key]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        root = module.split(".")[0]
        known = key in _KNOWN_NAMES or (root in _KNOWN_MODULES and not module.startswith(_MODULES_OF_CODE))
        require(known, f"{self._where}: the pickle names {module}.{name}; refused, nothing of it was run")
        if key not in self._classes:
            self._classes[key] = type("Inert", (Inert,), {"name": f"{module}.{name}"})
        return self._classes[key]

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key = (*pid, None, None, None)[:3] if isinstance(pid, tuple) else (None, None, None)
        if kind != "storage" or not isinstance(key, str):
            raise CheckpointError(f"{self._where}: unknown kind of storage in a torch file")
        return StorageRef(key, dtype if isinstance(dtype, torch.dtype) else torch.uint8)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    plain = isinstance(offset, int) and isinstance(size, tuple) and isinstance(stride, tuple)
    numbers = plain and all(type(value) is int and value >= 0 for value in (offset, *size, *stride))
    require(
        isinstance(storage, StorageRef) and numbers and len(size) == len(stride),
        "a tensor in a torch file has an impossible offset, size or stride",
    )
    return TensorRef(storage, offset, size, stride)


def _encode(text: Any, encoding: Any) -> bytes:
    require(isinstance(text, str) and encoding == "latin1", "bytes in a pickle are encoded in an unknown way")
    return text.encode("latin1")


def _from_type(function: Callable[..., Any], _type: Any, arguments: tuple[Any, ...], _state: Any) -> Any:
    require(function is _rebuild_tensor, "a tensor subclass in a torch file is rebuilt in an unknown way")
    return function(*arguments)


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
}
