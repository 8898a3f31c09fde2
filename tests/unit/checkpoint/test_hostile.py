"""Archives, pickles and headers made to do harm: each is refused with a sentence, and nothing happens."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_samples import random_state, tiny_config

from minitron.checkpoint import limits, pickles
from minitron.checkpoint.archive import open_archive
from minitron.checkpoint.gguf.read import read_gguf
from minitron.checkpoint.gguf.write import write_gguf
from minitron.checkpoint.limits import CheckpointError, member_path
from minitron.checkpoint.nemo.megatron_files import read_torch_dist, read_zarr
from minitron.checkpoint.nemo.read import open_nemo
from minitron.checkpoint.nemo.write import write_nemo
from minitron.checkpoint.pickles import load_inert
from minitron.checkpoint.tensors import ByteRange, Checkpoint, from_tensor
from minitron.checkpoint.torch_file import TorchFile
from minitron.checkpoint.yaml_values import parse_yaml


def checkpoint(**options: object) -> Checkpoint:
    config = tiny_config(**options)
    return Checkpoint(config, {name: from_tensor(tensor) for name, tensor in random_state(config).items()})


def tar_with(path: Path, *members: tarfile.TarInfo, data: bytes = b"x") -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


HOSTILE_MEMBERS = {
    "parent": member("../escaped"),
    "deep parent": member("model_weights/../../escaped"),
    "absolute": member("/tmp/escaped"),
    "drive": member("C:/escaped"),
    "backslash": member("..\\escaped"),
    "control": member("a\nb"),
    "symlink": member("model_config.yaml", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": member("model_config.yaml", tarfile.LNKTYPE, "/etc/passwd"),
    "device": member("model_config.yaml", tarfile.CHRTYPE),
    "pipe": member("model_config.yaml", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("case", HOSTILE_MEMBERS)
def test_tar_members(tmp_path: Path, case: str) -> None:
    path = tar_with(tmp_path / "bad.nemo", HOSTILE_MEMBERS[case])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"inside the checkpoint|plain files"), open_nemo(path, tmp_path):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_member_twice(tmp_path: Path) -> None:
    path = tar_with(tmp_path / "bad.nemo", member("a"), member("./a"))
    with pytest.raises(CheckpointError, match="twice"), open_archive(path, tmp_path):
        pass


@pytest.mark.parametrize("name", ["", "a/../b", "/a", "..", "a\0b", "x" * 2000])
def test_names(name: str) -> None:
    with pytest.raises(CheckpointError, match="inside"):
        member_path(name, "test")


def test_gzip_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.checkpoint.archive.MIN_INFLATED_BYTES", 1 << 20)
    path = tmp_path / "bomb.nemo"
    with tarfile.open(path, "w:gz") as tar:
        info = member("zeros")
        info.size = 20 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="bomb"), open_archive(path, tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [path]


def test_tar_header_that_asks_for_a_terabyte(tmp_path: Path) -> None:
    info = member("model_config.yaml")
    info.size = 1 << 40
    path = tmp_path / "big.nemo"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
    with pytest.raises(CheckpointError, match="cut or corrupted"), open_archive(path, tmp_path):
        pass
    long_name = member("x", tarfile.GNUTYPE_LONGNAME)
    long_name.size = 1 << 40
    path.write_bytes(long_name.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
    with pytest.raises(CheckpointError, match="tar header"), open_archive(path, tmp_path):
        pass


# --- pickles -----------------------------------------------------------------------------------------------------


class Runs:
    """Unpickles to a call of any function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize(
    "function", [os.system, eval, exec, getattr, __import__, open, torch.load, torch.hub.load, Path.touch]
)
def test_code_in_a_pickle_is_never_run(tmp_path: Path, function: Callable) -> None:
    mark = tmp_path / "mark"
    command = f"open({str(mark)!r}, 'w')" if function in (eval, exec) else f"touch {mark}"
    argument: object = mark if function in (Path.touch,) else command
    for protocol in (2, 4):
        data = pickle.dumps({"model.x": Runs(function, argument)}, protocol=protocol)
        # A name in torch or pathlib becomes an inert record, any other is refused.
        with contextlib.suppress(CheckpointError):
            assert type(load_inert(data, "test")["model.x"]).__name__ == "Inert"
    torch.save({"model.x": Runs(function, argument)}, tmp_path / "model_weights.ckpt")
    with pytest.raises(CheckpointError), open_nemo(tmp_path, tmp_path):
        pass
    assert not mark.exists()


def test_code_in_dcp_metadata_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    write_nemo(checkpoint(), tmp_path / "nemo2", form="nemo2")
    (tmp_path / "nemo2" / "weights" / ".metadata").write_bytes(pickle.dumps(Runs(os.system, f"touch {mark}")))
    (tmp_path / "nemo2" / "weights" / "common.pt").write_bytes(pickle.dumps(Runs(os.system, f"touch {mark}")))
    with pytest.raises(CheckpointError, match=r"names posix.system; refused"), open_nemo(tmp_path / "nemo2", tmp_path):
        pass
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo index of two thousand million
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 50) + b".",  # a bytearray of a petabyte
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
        b"\x80\x02\x82\x01.",  # an entry of the extension registry
        b"\x80\x02cos\nsystem\n(S'true'\ntR.",
        b"(" * 1000 + b".",
        b"",
        b"\x80\x04.",
    ],
)
def test_pickles_that_exhaust(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        load_inert(data, "test")


_DOUBLED = b"N\x85q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(45))  # 2**45 leaves
_NESTED = b"N" + b"\x85" * 100_000


@pytest.mark.parametrize("item", [_DOUBLED, _NESTED], ids=["doubled", "nested"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"}", b"Ns"),
        (b"}(", b"Nu"),
        (b"(", b"Nd"),
        (b"\x8f(", b"\x90"),
        (b"(", b"\x91"),
        (b"cbuiltins\nset\n](", b"e\x85R"),
        (b"c__builtin__\nset\n(", b"t\x85R"),
        (b"ccollections\nOrderedDict\n]((", b"Nte\x85R"),
    ],
)
def test_what_is_hashed_is_small(item: bytes, before: bytes, after: bytes) -> None:
    """As a value of a state dict, so that nothing else in the file is wrong: whoever hashes it hangs or crashes."""
    data = b"\x80\x04}X\x01\x00\x00\x00a" + before + item + after + b"s."
    with pytest.raises(CheckpointError, match="as a key, expected a short plain value"):
        load_inert(data, "test")


@pytest.mark.parametrize(
    "target", [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nfloat32\n", b"K\x01", b")", b"ctorch\nSize\n"]
)
def test_build_sets_no_attributes(target: bytes) -> None:
    before = dict(vars(pickles._rebuild_tensor)), pickles._rebuild_tensor.__kwdefaults__
    for state in (b"}X\x0e\x00\x00\x00__kwdefaults__}s", b"N}X\x0e\x00\x00\x00__kwdefaults__}s\x86"):
        with pytest.raises(CheckpointError, match="sets attributes"):
            load_inert(b"\x80\x02" + target + state + b"b.", "test")
    assert (dict(vars(pickles._rebuild_tensor)), pickles._rebuild_tensor.__kwdefaults__) == before


def test_plain_keys_of_other_types_are_kept() -> None:
    value = {1: "a", (1, "b"): 2, None: 3, 1.5: 4, b"x": 5, "s": {7, 8}}
    found = load_inert(pickle.dumps(value, protocol=2), "test")
    assert {key: item for key, item in found.items() if key != "s"} == {k: v for k, v in value.items() if k != "s"}


def torch_zip(path: Path, structure: bytes, storages: dict[str, bytes], compress: bool = False) -> TorchFile:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", structure)
        for key, data in storages.items():
            archive.writestr(f"a/data/{key}", data)
    return TorchFile(ByteRange.whole(path))


def tensor_pickle(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.zeros(1), buffer)
    with zipfile.ZipFile(buffer) as archive:
        plain = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    marker = b"QK\x00K\x01\x85q\x06K\x01\x85q\x07"  # after the storage: offset 0, size (1,), stride (1,)
    assert plain.count(marker) == 1
    shapes = pickle.dumps((offset, size, stride), protocol=2)[2:-1]
    # The tuple is taken apart by unpickling here, so that the bytes of each value are right.
    values = [pickle.dumps(value, protocol=2)[2:-1] for value in (offset, size, stride)]
    assert shapes
    return plain.replace(marker, b"Q" + b"".join(values))


def test_tensors_beyond_their_storage(tmp_path: Path) -> None:
    good = torch_zip(tmp_path / "good", tensor_pickle(0, (2,), (1,)), {"0": b"\0" * 8})
    assert good.tensor(good.value).load().tolist() == [0, 0]
    for offset, size, stride in ((0, (3,), (1,)), (1, (2,), (1,)), (0, (1 << 40,), (1,)), (0, (2, 2), (0, 1 << 40))):
        bad = torch_zip(tmp_path / "bad", tensor_pickle(offset, size, stride), {"0": b"\0" * 8})
        with pytest.raises(CheckpointError, match="cut"):
            bad.tensor(bad.value)
    with pytest.raises(CheckpointError, match="impossible"):
        torch_zip(tmp_path / "bad", tensor_pickle(-1, (1,), (1,)), {"0": b"\0" * 8})
    bad = torch_zip(tmp_path / "bad", tensor_pickle(0, (1,), (1,)), {})
    with pytest.raises(CheckpointError, match="missing"):
        bad.tensor(bad.value)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="compressed"):
        torch_zip(tmp_path / "bad", tensor_pickle(0, (1,), (1,)), {"0": bytes(1 << 20)}, compress=True)


# --- YAML, JSON, distributed folders -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: !!python/object/apply:os.system ['true']", "plain values"),
        ("!!python/object/new:list []", "plain values"),
        ("a: !custom x", "plain values"),
        ("a: 1\na: 2", "twice"),
        ("[1, 2]", "expected a mapping"),
        ("a: [", "plain values"),
        ("{" * 5000, "plain values"),
        ("a: " + "[" * 3000, "plain values"),
    ],
)
def test_yaml(text: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        parse_yaml(text.encode(), "test")


def test_yaml_alias_bomb() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(CheckpointError, match="aliases"):
        parse_yaml("\n".join(lines).encode(), "test")
    with pytest.raises(CheckpointError, match=r"aliases|plain"):
        parse_yaml(b"a: &a [*a]", "test")


def test_missing_ranks(tmp_path: Path) -> None:
    write_nemo(checkpoint(), tmp_path / "nemo2", form="nemo2")
    (tmp_path / "nemo2" / "weights" / "__0_0.distcp").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="missing"), open_nemo(tmp_path / "nemo2", tmp_path):
        pass
    for rank in ("tp_rank_00_pp_rank_000", "tp_rank_01_pp_rank_001"):
        path = tmp_path / "ranks" / rank / "model_weights.ckpt"
        path.parent.mkdir(parents=True)
        torch.save({"model.decoder.final_layernorm.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="grid"), open_nemo(tmp_path / "ranks", tmp_path):
        pass


def zarr(tmp_path: Path, **changes: object) -> dict[str, ByteRange]:
    header = {"chunks": [2, 2], "compressor": None, "dtype": "<f4", "filters": None, "order": "C", "shape": [4, 2],
              "zarr_format": 2, **changes}  # fmt: skip
    folder = tmp_path / "w"
    folder.mkdir(exist_ok=True)
    (folder / ".zarray").write_text(json.dumps(header))
    for name in ("0.0", "1.0"):
        (folder / name).write_bytes(bytes(16))
    with open_archive(tmp_path, tmp_path) as files:
        return files


def test_zarr_headers(tmp_path: Path) -> None:
    assert read_zarr(zarr(tmp_path), "t")["w"].tensor().load().shape == (4, 2)
    for changes, sentence in (
        ({"shape": [1 << 40, 1 << 40]}, "chunks, but there are"),
        ({"shape": [1 << 60, 2]}, "dimension"),
        ({"chunks": [0, 2]}, "at least 1"),
        ({"shape": [-4, 2]}, "dimension"),
        ({"chunks": [1, 2]}, "files in all|missing|cut"),
        ({"chunks": [4, 2], "shape": [4, 2]}, "cut"),
        ({"compressor": {"id": "blosc"}}, "compressed"),
        ({"dtype": "|O"}, "dtype"),
        ({"order": "F"}, "column-major"),
        ({"shape": "many"}, "lists of one"),
        ({"zarr_format": 3}, "zarr_format"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            read_zarr(zarr(tmp_path, **changes), "t")


def test_torch_dist_files_outside(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    write_nemo(checkpoint(), tmp_path / "nemo2", form="nemo2")
    path = tmp_path / "nemo2" / "weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    path.write_bytes(pickle.dumps(metadata))
    with (
        open_archive(tmp_path / "nemo2" / "weights", tmp_path) as files,
        pytest.raises(CheckpointError, match="inside"),
    ):
        read_torch_dist(files, "t")
    index = next(key for key in metadata.storage_data if key.offset is not None)
    metadata.storage_data = {MetadataIndex(index.fqn, index.offset): metadata.storage_data[index]}
    path.write_bytes(pickle.dumps(metadata))
    with open_archive(tmp_path / "nemo2" / "weights", tmp_path) as files, pytest.raises(CheckpointError):
        read_torch_dist(files, "t")


# --- GGUF --------------------------------------------------------------------------------------------------------


def gguf_header(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    "data",
    [
        gguf_header(1 << 60, 0),
        gguf_header(0, 1 << 60),
        gguf_header(0, 1, struct.pack("<Q", 1 << 62)),
        gguf_header(0, 1, text(b"k") + struct.pack("<I", 99)),
        gguf_header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 61)),
        gguf_header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 61)),
        gguf_header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1) * 9),
        gguf_header(1, 0, text(b"t") + struct.pack("<I", 1 << 31)),
        gguf_header(1, 0, text(b"t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)),
        gguf_header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1 << 63)),
        gguf_header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 4, 777, 0)),
        gguf_header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 0)),
        gguf_header(0, 0)[:20],
        b"GGUF",
        b"",
    ],
)
def test_gguf_headers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_gguf(path)


def test_cut_gguf(tmp_path: Path) -> None:
    write_gguf(checkpoint(), tmp_path / "m.gguf", quantization="f32")
    data = (tmp_path / "m.gguf").read_bytes()
    for size in (10, 100, 1000, len(data) // 2, len(data) - 200):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_gguf(tmp_path / "cut.gguf")


def test_limits_are_finite() -> None:
    numbers = [value for name, value in vars(limits).items() if name.isupper() and isinstance(value, int)]
    assert numbers
    assert all(0 < value <= 1 << 40 for value in numbers)
