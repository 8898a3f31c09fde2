"""GGUF files in several parts, as the `gguf` package and llama.cpp's own splitter write them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_samples import random_state, tiny_config

from minitron.checkpoint.detect import detect
from minitron.checkpoint.gguf.read import open_gguf
from minitron.checkpoint.gguf.write import write_gguf
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.tensors import Checkpoint, from_tensor

gguf = pytest.importorskip("gguf")


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model split by the gguf package, and the whole one beside it."""
    config = tiny_config()
    tensors = {name: from_tensor(tensor) for name, tensor in random_state(config, torch.bfloat16).items()}
    write_gguf(Checkpoint(config, tensors), tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    writer = gguf.GGUFWriter(tmp_path / "parts" / "model.gguf", "nemotron", split_max_tensors=10)
    (tmp_path / "parts").mkdir()
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sorted((tmp_path / "parts").iterdir())
    assert [path.name for path in found] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_part_stands_for_all(parts: list[Path], named: int) -> None:
    whole, found = open_gguf(parts[0].parent.parent / "whole.gguf"), open_gguf(parts[named])
    assert found.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(found.get(name).load(), tensor.load()) for name, tensor in whole.tensors.items())
    assert found.config.to_dict() == whole.config.to_dict()


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    with pytest.raises(CheckpointError, match=rf"part {missing + 1} of 3 of .* is missing"):
        open_gguf(parts[(missing + 1) % 3])


def test_a_part_under_another_name(parts: list[Path]) -> None:
    with pytest.raises(CheckpointError, match="one of 3 parts, expected a name like"):
        open_gguf(parts[0].rename(parts[0].with_name("first.gguf")))


def test_parts_in_the_wrong_order(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match=r"split.no and split.count are \(1, 3\), expected \(2, 3\)"):
        open_gguf(parts[0])


def test_a_folder_of_parts_is_told_to_name_one(parts: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003.gguf.*pass the file"):
        detect(parts[0].parent)
