"""Checkpoints made to exhaust memory or time, or to crash: one function an attack, each writes the path it is given.

Each takes an empty place (a path that does not exist) and returns what to open. They are small on disk, up to 75 MB.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_samples import random_state, save_reference, tiny_config

from minitron.checkpoint.gguf.write import write_gguf
from minitron.checkpoint.names import hf_shapes
from minitron.checkpoint.nemo.write import write_nemo
from minitron.checkpoint.tensors import Checkpoint, from_tensor

Attack = Callable[[Path], Path]
ATTACKS: dict[str, Attack] = {}
P2, P4 = b"\x80\x02", b"\x80\x04"
DOUBLED = b"N\x85q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(45))  # 2**45 leaves
NESTED = b"N" + b"\x85" * 200_000
MERSENNE = (1 << 61) - 1  # hash(n) is n modulo this


def attack(name: str) -> Callable[[Attack], Attack]:
    """Enter a function into `ATTACKS`."""

    def enter(function: Attack) -> Attack:
        ATTACKS[name] = function
        return function

    return enter


def hf(place: Path, **config: Any) -> Path:
    """A good Hugging Face folder; `config` changes its config.json afterwards."""
    small = tiny_config()
    save_reference(place, small, random_state(small))
    path = place / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return place


def nemo2(place: Path) -> Path:
    """A good NeMo 2 folder."""
    small = tiny_config()
    tensors = {name: from_tensor(tensor) for name, tensor in random_state(small).items()}
    write_nemo(Checkpoint(small, tensors), place, form="nemo2")
    return place


# --- pickles in pytorch_model.bin ----------------------------------------------------------------------------------


def torch_bin(place: Path, structure: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A Hugging Face folder whose weights are a torch archive with this `data.pkl`."""
    hf(place)
    (place / "model.safetensors").unlink()
    with zipfile.ZipFile(place / "pytorch_model.bin", "w") as archive:
        archive.writestr("a/data.pkl", structure)
        for key, data in (storages or {}).items():
            archive.writestr(f"a/data/{key}", data)
    return place


def int_opcode(value: int) -> bytes:
    """LONG1 with the digits of `value`."""
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a%c" % len(data) + data


PICKLES = {
    "nested tuple as a key": lambda: P2 + b"}" + NESTED + b"Ns.",
    "nested tuple in an ordered dict": lambda: P2 + b"ccollections\nOrderedDict\n](" + NESTED + b"N\x86e\x85R.",
    "nested tuple in a set": lambda: P4 + b"\x8f(" + NESTED + b"\x90.",
    "nested tuple in a frozenset": lambda: P4 + b"(" + NESTED + b"\x91.",
    "doubled tuple as a key": lambda: P2 + b"}(" + DOUBLED + b"Nu.",
    "doubled tuple as a set item": lambda: P4 + b"\x8f(" + DOUBLED + b"\x90.",
    "doubled tuple in a frozenset": lambda: P4 + b"(" + DOUBLED + b"\x91.",
    "doubled tuple as a name": lambda: P4 + DOUBLED + b"\x8c\x01a\x93.",
    "doubled list as the state dict": lambda: (
        P2 + b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"."
    ),
    "chosen hashes as keys": lambda: (
        P2 + b"}(" + b"".join(int_opcode(k * MERSENNE) + b"N" for k in range(60_000)) + b"u."
    ),
    "chosen hashes in tuples": lambda: (
        P2 + b"}(" + b"".join(int_opcode(k * MERSENNE) + b"\x85N" for k in range(60_000)) + b"u."
    ),
    "opcodes that do nothing": lambda: P2 + b"N0" * 20_000_000 + b"N.",
    "marks": lambda: P2 + b"(" * 20_000_000,
    "empty sets": lambda: P4 + b"\x8f" * 5_000_000 + b".",
    "empty dicts": lambda: P4 + b"}" * 5_000_000 + b".",
    "memo entries": lambda: P4 + b"N" + b"\x94" * 20_000_000 + b".",
    "a memo index of two thousand million": lambda: P2 + b"]r\xff\xff\xff\x7f.",
    "a number of many bytes": lambda: P2 + b"\x8b" + struct.pack("<I", 30_000_000) + b"\x01" * 30_000_000 + b".",
    "a number of many digits": lambda: b"I" + b"1" * 30_000_000 + b"\n.",
    "a long number as text": lambda: b"L" + b"9" * 5_000_000 + b"L\n.",
    "a long float as text": lambda: b"F0." + b"1" * 30_000_000 + b"\n.",
    "an endless name": lambda: b"c" + b"a" * 30_000_000,
    "one long tuple as many sizes": lambda: (
        P2 + b"(" + b"K\x01" * 200_000 + b"tq\x000ctorch\nSize\nq\x010" + b"h\x01h\x00\x85R0" * 200_000 + b"N."
    ),
    "one long list as many ordered dicts": lambda: (
        P2
        + b"]("
        + b"K\x01N\x86" * 100_000
        + b"eq\x000ccollections\nOrderedDict\nq\x010"
        + b"h\x01h\x00\x85R0" * 100_000
        + b"N."
    ),
    "one long text encoded many times": lambda: (
        P2
        + b"X"
        + struct.pack("<I", 1_000_000)
        + b"a" * 1_000_000
        + b"q\x000c_codecs\nencode\nq\x010X\x06\x00\x00\x00latin1q\x020"
        + b"h\x01h\x00h\x02\x86R" * 10_000
        + b"."
    ),
    "attributes of a dtype": lambda: P2 + b"ctorch\nfloat32\n}X\x01\x00\x00\x00aNsb.",
    "a call of a number": lambda: P2 + b"K\x01)R.",
    "items of a tuple": lambda: P2 + b")(K\x01e.",
    "a state dict of nothing but names": lambda: (
        P2 + b"}(" + b"".join(b"X\x06\x00\x00\x00%06dN" % i for i in range(600_000)) + b"u."
    ),
}


def _pickle_attack(structure: Callable[[], bytes]) -> Attack:
    return lambda place: torch_bin(place, structure())


for _name, _structure in PICKLES.items():
    ATTACKS[f"pickle: {_name}"] = _pickle_attack(_structure)


def tensor_structure(tensors: dict[str, tuple[tuple[int, ...], str]], storage: str = "FloatStorage") -> bytes:
    """A state dict of row-major tensors, each with its shape and the key of its storage."""
    out = [P2, b"}("]
    for name, (size, key) in tensors.items():
        stride = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
        out += [b"X", struct.pack("<I", len(name)), name.encode(), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        out += [
            b"X\x07\x00\x00\x00storagectorch\n",
            storage.encode(),
            b"\nX",
            struct.pack("<I", len(key)),
            key.encode(),
        ]
        out += [b"X\x03\x00\x00\x00cpuK\x01tQK\x00"]
        out += [*(pickle.dumps(values, protocol=2)[2:-1] for values in (size, stride)), b"\x89NtR"]
    return b"".join([*out, b"u."])


def torch_state(place: Path, state: dict[str, torch.Tensor], before: bytes = b"", **config: Any) -> Path:
    """A Hugging Face folder whose weights torch.save wrote; `before` stands before the opcodes of its pickle."""
    hf(place, **config)
    (place / "model.safetensors").unlink()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as found, zipfile.ZipFile(place / "pytorch_model.bin", "w") as archive:
        for name in found.namelist():
            data = found.read(name)
            archive.writestr(name, data[:2] + before + data[2:] if name.endswith("data.pkl") else data)
    return place


# BUILD with (None, slots) sets attributes; the state dict that follows is a good one.
FUNCTION_ATTRIBUTES = {"__kwdefaults__": b"}", "__defaults__": b"(K\x00K\x00K\x00K\x00K\x00t", "__doc__": b"N"}


def _attribute_attack(name: str, value: bytes) -> Attack:
    setting = b"N}X" + struct.pack("<I", len(name)) + name.encode() + value + b"s\x86b0"
    return lambda place: torch_state(
        place, random_state(tiny_config()), b"ctorch._utils\n_rebuild_tensor_v2\n" + setting
    )


for _name, _value in FUNCTION_ATTRIBUTES.items():
    ATTACKS[f"pickle: {_name} of a function, then a state dict"] = _attribute_attack(_name, _value)

# 512 MiB for each of the two matrices, in the shape that config.json asks for.
LONG = 1 << 22
VIEWS = {
    "stride 0 in both dimensions": lambda: torch.zeros(4).as_strided((LONG, 32), (0, 0)),  # 16 bytes
    "stride 0 in rows": lambda: torch.zeros(32).expand(LONG, 32),
    "stride 0 in columns": lambda: torch.zeros(LONG, 1).expand(LONG, 32),
    "overlapping rows": lambda: torch.zeros(LONG + 31).as_strided((LONG, 32), (1, 1)),
}


def _view_attack(view: Callable[[], torch.Tensor]) -> Attack:
    def write(place: Path) -> Path:
        large = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), view())
        return torch_state(place, {**random_state(tiny_config()), **large}, vocab_size=LONG)

    return write


for _name, _view in VIEWS.items():
    ATTACKS[f"tensor: {_name}"] = _view_attack(_view)

DEEP_SIZES: dict[str, Any] = {"num_hidden_layers": 100, "intermediate_size": 1 << 16}  # 1.6 GB


@attack("tensor: one storage under many names")
def _(place: Path) -> Path:
    shapes = hf_shapes(tiny_config(**DEEP_SIZES))
    values = torch.zeros(max(map(math.prod, shapes.values())))
    return torch_state(place, {n: values[: math.prod(s)].view(s) for n, s in shapes.items()}, **DEEP_SIZES)


@attack("tensor: many storages at one place")
def _(place: Path) -> Path:
    shapes = hf_shapes(tiny_config(**DEEP_SIZES))
    keys = {name: str(number) for number, name in enumerate(shapes)}
    first = bytes(4 * max(map(math.prod, shapes.values())))
    structure = tensor_structure({name: (shape, keys[name]) for name, shape in shapes.items()})
    torch_bin(place, structure, {key: b"" if int(key) else first for key in keys.values()})
    config = place / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **DEEP_SIZES}))
    return _all_at_one_place(place)


def _all_at_one_place(place: Path) -> Path:
    """Gives each storage in the zip directory the place and the sizes of the first."""
    path = place / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    at, first = data.index(b"PK\x01\x02"), None
    while data[at : at + 4] == b"PK\x01\x02":
        name = bytes(data[at + 46 : at + 46 + int.from_bytes(data[at + 28 : at + 30], "little")])
        if name == b"a/data/0":
            first = bytes(data[at + 16 : at + 28]), bytes(data[at + 42 : at + 46])
        elif first:
            data[at + 16 : at + 28], data[at + 42 : at + 46] = first
        at += 46 + sum(int.from_bytes(data[at + k : at + k + 2], "little") for k in (28, 30, 32))
    path.write_bytes(data)
    return place


@attack("tensor: half a million empty ones")
def _(place: Path) -> Path:
    one = tensor_structure({"x": ((0,), "0")})[3:-2]
    value = one[one.index(b"x", 5) + 1 :]
    names = b"".join(b"X\x06\x00\x00\x00%06dh\x00" % i for i in range(500_000))
    return torch_bin(place, P2 + value + b"q\x000}(" + names + b"u.", {"0": b""})


@attack("zip: a directory of half a million entries")
def _(place: Path) -> Path:
    hf(place)
    (place / "model.safetensors").unlink()
    entry = b"PK\x01\x02" + bytes(42)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 46 * 500_000, 0, 0)
    (place / "pytorch_model.bin").write_bytes(entry * 500_000 + end)
    return place


# --- .metadata of torch.distributed.checkpoint ---------------------------------------------------------------------


def dcp_metadata(place: Path, change: Callable[[Any], object]) -> Path:
    """A NeMo 2 folder whose `.metadata` was unpickled, changed and pickled again."""
    path = nemo2(place) / "weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata, protocol=4))
    return place


def _doubled() -> Any:
    value: Any = (1,)
    for _ in range(45):
        value = (value, value)
    return value


def _parameter(metadata: Any) -> Any:
    return next(v for n, v in metadata.state_dict_metadata.items() if "linear_fc1.weight" in n)


@attack("metadata: a doubled tuple as a size")
def _(place: Path) -> Path:
    return dcp_metadata(place, lambda m: setattr(_parameter(m), "size", _doubled()))


@attack("metadata: a doubled tuple as offsets")
def _(place: Path) -> Path:
    return dcp_metadata(place, lambda m: setattr(_parameter(m).chunks[0], "offsets", _doubled()))


@attack("metadata: a doubled tuple as the sizes of a chunk")
def _(place: Path) -> Path:
    return dcp_metadata(place, lambda m: setattr(_parameter(m).chunks[0], "sizes", _doubled()))


@attack("metadata: a doubled tuple as the offset of an index")
def _(place: Path) -> Path:
    def change(metadata: Any) -> None:
        for index in metadata.storage_data:
            object.__setattr__(index, "offset", _doubled())

    return dcp_metadata(place, change)


@attack("metadata: a doubled tuple as the place of a record")
def _(place: Path) -> Path:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset, info.relative_path = _doubled(), _doubled()

    return dcp_metadata(place, change)


@attack("metadata: one chunk half a million times")
def _(place: Path) -> Path:
    return dcp_metadata(place, lambda m: setattr(_parameter(m), "chunks", _parameter(m).chunks[:1] * 500_000))


@attack("metadata: one tensor under many names")
def _(place: Path) -> Path:
    def change(metadata: Any) -> None:
        described = _parameter(metadata)
        metadata.state_dict_metadata |= {f"model.decoder.layers.x{i}.weight": described for i in range(150_000)}

    return dcp_metadata(place, change)


@attack("metadata: long names of prefixes")
def _(place: Path) -> Path:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata = {"model." * 200_000 + "decoder.x": _parameter(metadata)}

    return dcp_metadata(place, change)


# --- archives ------------------------------------------------------------------------------------------------------


def zipped(place: Path, members: dict[str, bytes]) -> Path:
    """A gzip `.nemo` with these members."""
    path = place.with_suffix(".nemo")
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def braces(size: int) -> bytes:
    """A JSON list of empty maps."""
    return b"[" + b"{}," * (size // 3) + b"{}]"


@attack("gzip: 180 MB of {}, as metadata.json")
def _(place: Path) -> Path:
    return zipped(place, {"model_weights/metadata.json": braces(180_000_000)})


@attack("gzip: 50 MB of {}, as context/io.json")
def _(place: Path) -> Path:
    good = nemo2(place)
    weights = {f"weights/{path.name}": path.read_bytes() for path in (good / "weights").iterdir() if path.is_file()}
    return zipped(place, {**weights, "context/io.json": braces(50 << 20)})


@attack("gzip: 50 MB of zarr headers")
def _(place: Path) -> Path:
    return zipped(place, {"model_weights/model.decoder.x/.zarray": b'{"a":[' + b"1," * (20 << 20)})


def raw_tar(place: Path, *parts: bytes) -> Path:
    """A `.nemo` of raw headers and data."""
    path = place.with_suffix(".nemo")
    path.write_bytes(b"".join(part + bytes(-len(part) % 512) for part in parts) + bytes(1024))
    return path


def tar_header(kind: bytes, size: int = 0, name: str = "x") -> bytes:
    """One header block."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


@attack("pax: 120 kB of digits")
def _(place: Path) -> Path:
    return raw_tar(place, tar_header(b"x", 120_000), b"1" * 120_000, tar_header(b"0"))


@attack("pax: a valid record of digits, many times")
def _(place: Path) -> Path:
    record = b"60007 comment=" + b"1" * 59_992 + b"\n"
    return raw_tar(place, *[tar_header(b"x", len(record)), record, tar_header(b"0")] * 500)


@attack("pax: digits in a global header")
def _(place: Path) -> Path:
    return raw_tar(place, *[tar_header(b"g", 60_000), b"1" * 60_000] * 100)


@attack("pax: a sparse member")
def _(place: Path) -> Path:
    record = b"30 GNU.sparse.realsize=999999\n"
    return raw_tar(place, tar_header(b"x", len(record)), record, tar_header(b"0"))


@attack("tar: a GNU name of a megabyte")
def _(place: Path) -> Path:
    return raw_tar(place, tar_header(b"L", 1 << 20), b"a/" * (1 << 19), tar_header(b"0"))


@attack("tar: nothing but long names")
def _(place: Path) -> Path:
    return raw_tar(place, *[tar_header(b"L", 512), b"a" * 512] * 60_000)


@attack("tar: too many members")
def _(place: Path) -> Path:
    path = place.with_suffix(".nemo")
    path.write_bytes(tar_header(b"5", 0, "a") * 140_000)
    return path


@attack("tar: a size of 2**80")
def _(place: Path) -> Path:
    block = bytearray(tar_header(b"0"))
    block[124:136] = b"\x80" + (1 << 80).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return raw_tar(place, bytes(block))


# --- safetensors, indices ------------------------------------------------------------------------------------------


def safetensors(place: Path, header: bytes) -> Path:
    """A Hugging Face folder whose weights are a file of this header."""
    (hf(place) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return place


_LINE = '"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
HEADERS = {
    "75 MB of entries": lambda: b"{" + "".join(_LINE % i for i in range(1_200_000)).encode()[:-1] + b"}",
    "75 MB of empty maps": lambda: b'{"a":[' + b"{}," * 25_000_000 + b"{}]}",
    "75 MB of lists": lambda: b'{"a":[' + b"[]," * 25_000_000 + b"[]]}",
    "75 MB of numbers": lambda: b'{"a":[' + b"1e9," * 18_000_000 + b"1]}",
    "75 MB of texts": lambda: b'{"a":[' + b'"ab",' * 15_000_000 + b"1]}",
    "75 MB of text with one wide character": lambda: (
        b'{"__metadata__":{"a":"' + b"a" * 75_000_000 + "\U0001f600".encode() + b'"}}'
    ),
    "75 MB of one name": lambda: b'{"' + b"a" * 75_000_000 + b'":1}',
    "deep nesting": lambda: b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "terminal codes in a name": lambda: b'{"\\u001b[2J":{"dtype":"X","shape":[0],"data_offsets":[0,0]}}',
    "a dtype that is a list": lambda: b'{"a":{"dtype":[],"shape":[0],"data_offsets":[0,0]}}',
    "a number of many digits": lambda: b'{"a":' + b"1" * 1_000_000 + b"}",
}


def _header_attack(header: Callable[[], bytes]) -> Attack:
    return lambda place: safetensors(place, header())


for _name, _structure in HEADERS.items():
    ATTACKS[f"safetensors: {_name}"] = _header_attack(_structure)

# Entries of the header of a file that is good otherwise.
ENTRIES: dict[str, dict[str, Any]] = {
    "metadata that is a list": {"__metadata__": [1]},
    "metadata of numbers": {"__metadata__": {"format": 1}},
    "metadata of nested maps": {"__metadata__": {"format": {"a": {}}}},
    "half a surrogate pair": {"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
}


def _entry_attack(entry: dict[str, Any]) -> Attack:
    def write(place: Path) -> Path:
        path = hf(place) / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.dumps({**json.loads(data[8 : 8 + length]), **entry}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        return place

    return write


for _name, _entry in ENTRIES.items():
    ATTACKS[f"safetensors: {_name}"] = _entry_attack(_entry)


def index(place: Path, text: bytes) -> Path:
    """A Hugging Face folder whose weights are sharded, by this index."""
    hf(place)
    (place / "model.safetensors").rename(place / "a.safetensors")
    (place / "model.safetensors.index.json").write_bytes(text)
    return place


INDICES = {
    "60 MB of names": lambda: (
        b'{"metadata":{},"weight_map":{'
        + b"".join(b'"%07d":"a.safetensors",' % i for i in range(2_300_000))
        + b'"x":"a.safetensors"}}'
    ),
    "one file in many spellings": lambda: json.dumps(
        {"metadata": {}, "weight_map": {f"t{i}": "./" * i + "a.safetensors" for i in range(500)}}
    ).encode(),
    "a map of numbers": lambda: b'{"metadata":{},"weight_map":{"a":1}}',
    "no map": lambda: b'{"metadata":{}}',
    "a file outside": lambda: b'{"metadata":{},"weight_map":{"a":"../a.safetensors"}}',
    "a pickle among safetensors": lambda: b'{"metadata":{},"weight_map":{"a":"a.bin"}}',
}


def _index_attack(text: Callable[[], bytes]) -> Attack:
    return lambda place: index(place, text())


for _name, _structure in INDICES.items():
    ATTACKS[f"index: {_name}"] = _index_attack(_structure)


# --- YAML ----------------------------------------------------------------------------------------------------------

YAMLS = {
    "half a million items": lambda: b"a: [" + b"1," * 520_000 + b"]",
    "items within the size": lambda: b"a: [" + b"1," * 60_000 + b"]",
    "80,000 keys and one twice": lambda: b"".join(b"k%d: 1\n" % i for i in range(80_000)) + b"k0: 1\n",
    "keys within the size": lambda: b"".join(b"k%d: 1\n" % i for i in range(4_000)) + b"k0: 1\n",
    "a number in base 60": lambda: b"a: 1" + b":1" * 450_000,
    "a shorter number in base 60": lambda: b"a: 1" + b":1" * 60_000,
    "a float in base 60": lambda: b"a: 1" + b":1" * 60_000 + b".5",
    "a hexadecimal number": lambda: b"a: 0x" + b"f" * 120_000,
    "a binary number": lambda: b"a: 0b" + b"1" * 120_000,
    "a decimal number": lambda: b"a: " + b"9" * 120_000,
    "an explicit number": lambda: b'a: !!int "' + b"9" * 120_000 + b'"',
    "brackets": lambda: b"a: " + b"[" * 1000 + b"]" * 1000,
    "brackets that open only": lambda: b"a: " + b"[" * 120_000,
    "indents": lambda: b"".join(b" " * i + b"a:\n" for i in range(300)),
    "dashes": lambda: b"- " * 60_000,
    "aliases": lambda: b"a: [&a 1," + b"*a," * 40_000 + b"]",
    "aliases of aliases": lambda: (
        b"a0: &a0 [1,1,1,1,1,1,1,1]\n"
        + b"".join(b"a%d: &a%d [*a%d,*a%d,*a%d,*a%d]\n" % (i, i, *[i - 1] * 4) for i in range(1, 20))
    ),
    "merges of merges": lambda: (
        b"a0: &a0 {x: 1}\n" + b"".join(b"a%d: &a%d {<<: [*a%d,*a%d]}\n" % (i, i, i - 1, i - 1) for i in range(1, 30))
    ),
    "an alias of itself": lambda: b"a: &a [*a]",
    "an empty float": lambda: b'a: !!float ""',
    "an empty number": lambda: b'a: !!int ""',
    "an odd flag": lambda: b"a: !!bool maybe",
    "a month 99": lambda: b"a: 2001-99-99",
    "a time that is none": lambda: b"a: !!timestamp x",
    "bytes": lambda: b"a: !!binary aGVsbG8=",
    "a set": lambda: b"a: !!set {b, c}",
    "a list as a key": lambda: b"? [a, b]\n: 1",
    "numbers as keys": lambda: b"".join(b"%d: 1\n" % (k * MERSENNE) for k in range(2_500)),
}


def _yaml_attack(text: Callable[[], bytes]) -> Attack:
    def write(place: Path) -> Path:
        place.mkdir()
        (place / "model_config.yaml").write_bytes(text())
        torch.save({"model.decoder.final_layernorm.weight": torch.zeros(3)}, place / "model_weights.ckpt")
        return place

    return write


for _name, _structure in YAMLS.items():
    ATTACKS[f"yaml: {_name}"] = _yaml_attack(_structure)


# --- GGUF ----------------------------------------------------------------------------------------------------------


def gguf_text(value: bytes) -> bytes:
    """A text of GGUF."""
    return struct.pack("<Q", len(value)) + value


def gguf(place: Path, keys: list[bytes], tensors: list[bytes] | None = None, data: bytes = b"") -> Path:
    """A GGUF file."""
    path = place.with_suffix(".gguf")
    parts = [b"GGUF" + struct.pack("<IQQ", 3, len(tensors or []), len(keys)), *keys, *(tensors or [])]
    head = b"".join(parts)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


ARCH = gguf_text(b"general.architecture") + struct.pack("<I", 8) + gguf_text(b"nemotron")
COUNT = 8_000_000
GGUFS = {
    "an array of floats": lambda: ([gguf_text(b"a") + struct.pack("<IIQ", 9, 6, COUNT) + bytes(4 * COUNT)]),
    "an array of bytes": lambda: ([gguf_text(b"a") + struct.pack("<IIQ", 9, 0, 8 * COUNT) + bytes(8 * COUNT)]),
    "an array of empty texts": lambda: ([gguf_text(b"a") + struct.pack("<IIQ", 9, 8, COUNT) + bytes(8 * COUNT)]),
    "an array of arrays": lambda: ([gguf_text(b"a") + struct.pack("<IIQ", 9, 9, COUNT // 4) + bytes(12 * COUNT // 4)]),
    "a wide text": lambda: (
        [gguf_text(b"a") + struct.pack("<I", 8) + gguf_text(b"a" * (39 << 20) + "\U0001f600".encode())]
    ),
    "wide texts": lambda: (
        [
            gguf_text(b"%d" % i) + struct.pack("<I", 8) + gguf_text(b"a" * (6 << 20) + "\U0001f600".encode())
            for i in range(10)
        ]
    ),
    "the architecture as a number": lambda: ([gguf_text(b"general.architecture") + struct.pack("<II", 4, 7)]),
}


def _gguf_attack(keys: Callable[[], list[bytes]]) -> Attack:
    return lambda place: gguf(place, keys())


for _name, _keys in GGUFS.items():
    ATTACKS[f"gguf: {_name}"] = _gguf_attack(_keys)


def gguf_changed(place: Path, after: bytes, skipped: int, removed: int, value: bytes) -> Path:
    """A good GGUF file in which, `skipped` bytes after a name, `removed` bytes became `value`.

    Data is aligned to 32 bytes after the header, so the header must grow by a multiple of 32.
    """
    path = place.with_suffix(".gguf")
    small = tiny_config()
    tensors = {name: from_tensor(tensor) for name, tensor in random_state(small).items()}
    write_gguf(Checkpoint(small, tensors), path)
    data = path.read_bytes()
    at = data.index(gguf_text(after)) + 8 + len(after) + skipped
    path.write_bytes(data[:at] + value + data[at + removed :])
    return path


# Name -> the name before the value, and the type and value in place of 8 bytes.
GGUF_VALUES = {
    "epsilon as a text": (b"nemotron.attention.layer_norm_epsilon", struct.pack("<I", 8) + gguf_text(b"x" * 28)),
    "layers as a list": (b"nemotron.block_count", struct.pack("<IIQ", 9, 4, 6) + bytes(24)),
    "theta that is not a number": (b"nemotron.rope.freq_base", struct.pack("<If", 6, float("nan"))),
}


def _gguf_value_attack(name: bytes, value: bytes) -> Attack:
    return lambda place: gguf_changed(place, name, 0, 8, value)


for _name, (_key, _value) in GGUF_VALUES.items():
    ATTACKS[f"gguf: {_name}"] = _gguf_value_attack(_key, _value)


@attack("gguf: two tensors at one place")
def _(place: Path) -> Path:
    before = 4 + 2 * 8 + 4  # dimensions, type
    return gguf_changed(place, b"blk.1.ffn_up.weight", before, 8, bytes(8))


# --- config.json and what lies beside it ---------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "a million labels": {"num_labels": 1_000_000},
    "a map of labels": {"id2label": {str(i): "x" for i in range(200_000)}},
    "labels that are a list": {"id2label": ["a"]},
    "10**9 layers": {"num_hidden_layers": 10**9},
    "10**12 heads": {"num_attention_heads": 10**12, "num_key_value_heads": 10**12},
    "10**18 tokens": {"vocab_size": 10**18},
    "a head of 10**400": {"head_dim": 10**400},
    "10**400 positions": {"max_position_embeddings": 10**400},
    "heads as a fraction": {"num_attention_heads": 6.0},
    "a flag as a text": {"tie_word_embeddings": "false"},
    "epsilon as a list": {"norm_eps": [1]},
    "infinite epsilon": {"norm_eps": float("inf")},
    "theta that is not a number": {"rope_theta": float("nan")},
    "a scaling that is a list": {"rope_scaling": [1]},
    "a scaling of texts": {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
    "a million factors": {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 400_000}},
    "a method": {"to_dict": 1},
    "another method": {"from_pretrained": "x"},
    "a function of torch as dtype": {"dtype": "load"},
    "whole numbers as dtype": {"torch_dtype": "int8"},
    "a dtype that is a list": {"dtype": [1]},
    "a kernel of a stranger": {"attn_implementation": "stranger/kernel"},
    "a kernel of a stranger, hidden": {"_attn_implementation": "stranger/kernel"},
    "another file of weights": {"transformers_weights": "other.safetensors"},
    "layers that differ": {"per_layer_config": {"0": {"hidden_size": 7}}},
    "quantized, with too large shapes": {"quantization_config": {"quant_method": "gptq"}, "vocab_size": 1 << 22},
    "quantized, as a text": {"quantization_config": "int4"},
    "token ids as texts": {"eos_token_id": ["a"]},
    "architectures as a number": {"architectures": 7},
    "pruned heads as a list": {"pruned_heads": [1]},
    "an activation as a map": {"hidden_act": {"a": 1}},
}
GENERATION = {
    "a temperature as a list": {"temperature": [1]},
    "a map as top_k": {"top_k": {"a": 1}},
    "a text as max_length": {"max_length": "long"},
    "ids as texts": {"eos_token_id": "3"},
    "nested ids": {"eos_token_id": [[3]]},
    "a method": {"to_dict": 1},
    "another method": {"validate": None, "update": []},
    "infinity": {"temperature": float("inf")},
    "a million words": {"suppress_tokens": [1] * 400_000},
    "stop strings as numbers": {"stop_strings": [1]},
    "a list as a flag": {"do_sample": [True]},
}


def _config_attack(values: dict[str, Any]) -> Attack:
    return lambda place: hf(place, **values)


def _generation_attack(values: dict[str, Any]) -> Attack:
    def write(place: Path) -> Path:
        (hf(place) / "generation_config.json").write_text(json.dumps(values))
        return place

    return write


for _name, _values in CONFIGS.items():
    ATTACKS[f"config: {_name}"] = _config_attack(_values)
for _name, _values in GENERATION.items():
    ATTACKS[f"generation config: {_name}"] = _generation_attack(_values)


@attack("nemo: 10**12 heads")
def _(place: Path) -> Path:
    path = nemo2(place) / "context" / "model.yaml"
    path.write_text(re.sub(r"(num_attention_heads|num_query_groups): \d+", rf"\1: {10**12}", path.read_text()))
    return place


@attack("config: 4 MB of nested lists")
def _(place: Path) -> Path:
    path = hf(place) / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "x": ' + "[" * 500 + "]" * 500 + "}")
    return place


@attack("adapter beside a whole model")
def _(place: Path) -> Path:
    values = {"peft_type": "LORA", "base_model_name_or_path": ".", "target_modules": "(a|a?)+" * 30 + "b"}
    (hf(place) / "adapter_config.json").write_text(json.dumps(values))
    return place


@attack("tokenizer.json: 60 MB of empty maps")
def _(place: Path) -> Path:
    (hf(place) / "tokenizer.json").write_bytes(b'{"a":[' + b"{}," * 20_000_000 + b"{}]}")
    return place


@attack("tokenizer_config.json that is a list")
def _(place: Path) -> Path:
    (hf(place) / "tokenizer_config.json").write_text("[1]")
    return place
