"""Hugging Face folders, judged by the safetensors library and by transformers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_samples import random_state, save_reference, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron.checkpoint.hf import check_checkpoint, open_hf, write_hf
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.tensors import Checkpoint, LazyTensor, from_tensor
from minitron.files import TargetError


def test_written_shards_read_by_the_safetensors_library(tmp_path: Path, hf_folder: Path) -> None:
    expected = load_file(hf_folder / "model.safetensors")
    write_hf(open_hf(hf_folder), tmp_path / "out", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {}
    for name, place in index["weight_map"].items():
        with safe_open(tmp_path / "out" / place, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found[name] = file.get_tensor(name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) < 20_000 + 4096
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_transformers_loads_what_we_write(tmp_path: Path, hf_folder: Path) -> None:
    from transformers.models.nemotron import NemotronForCausalLM

    write_hf(open_hf(hf_folder), tmp_path / "out", max_shard_bytes=30_000)
    state = NemotronForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = load_file(hf_folder / "model.safetensors")
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_change(tmp_path: Path, hf_folder: Path, dtype: torch.dtype) -> None:
    source = open_hf(hf_folder)
    tensors = {name: tensor.to(dtype) for name, tensor in source.tensors.items()}
    write_hf(Checkpoint(source.config, tensors), tmp_path / "out")
    expected = load_file(hf_folder / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files_are_read_too(hf_folder: Path, sharded: bool) -> None:
    """What the conversion script of transformers 4.46 wrote, and torch.save of shards."""
    state = load_file(hf_folder / "model.safetensors")
    (hf_folder / "model.safetensors").unlink()
    if sharded:
        places = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
        for place in set(places.values()):
            torch.save({name: state[name] for name in state if places[name] == place}, hf_folder / place)
        (hf_folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        torch.save(state, hf_folder / "pytorch_model.bin")
    check_checkpoint(hf_folder)
    found = open_hf(hf_folder).tensors
    assert all(torch.equal(found[name].load(), state[name]) for name in state)


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    state = random_state(config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    write_hf(Checkpoint(config, {n: from_tensor(t) for n, t in state.items()}), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    check_checkpoint(tmp_path / "out")


def test_nothing_is_left_when_writing_fails(tmp_path: Path, hf_folder: Path) -> None:
    def stop(start: int, end: int) -> torch.Tensor:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    source = open_hf(hf_folder)
    source.tensors["model.norm.bias"] = LazyTensor((32,), torch.float32, stop)
    with pytest.raises(KeyboardInterrupt):
        write_hf(source, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_existing_target_is_kept_unless_told(tmp_path: Path, hf_folder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(TargetError, match="overwrite"):
            write_hf(open_hf(hf_folder), tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "precious").read_text() == "x"
    (tmp_path / "out" / "precious").unlink()
    write_hf(open_hf(hf_folder), tmp_path / "out")
    with pytest.raises(TargetError, match="is there already"):
        write_hf(open_hf(hf_folder), tmp_path / "out")
    write_hf(open_hf(hf_folder), tmp_path / "out", overwrite=True)
    check_checkpoint(tmp_path / "out")


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _edit_header(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _drop_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors")


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _outside_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../hf/other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "gpt2": (lambda f: _edit_config(f, model_type="gpt2"), "model_type is 'gpt2'; the architectures that minitron"),
    "not the llama it says": (
        lambda f: _edit_config(f, model_type="llama", hidden_size=36),
        "Llama rotates all channels",
    ),
    "bad json": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected an object"),
    "deep json": (lambda f: (f / "config.json").write_text("[" * 200_000), "not valid JSON"),
    "bad heads": (lambda f: _edit_config(f, num_key_value_heads=5), "num_attention_heads"),
    "text for number": (lambda f: _edit_config(f, hidden_size="64"), "hidden_size"),
    "endless layers": (lambda f: _edit_config(f, num_hidden_layers=10**12), "num_hidden_layers"),
    "endless labels": (lambda f: _edit_config(f, num_labels=10**12), "num_labels"),
    "other shape": (
        lambda f: _edit_config(f, intermediate_size=97),
        r"up_proj.weight has shape \[96, 32\].*\[97, 32\]",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "expected the weights"),
    "cut": (_cut, "cut or not complete"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "too short"),
    "terabytes": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "header length"),
    "missing tensor": (_drop_tensor, "no tensor model.layers.1.mlp.up_proj.weight"),
    "missing shard": (_missing_shard, "a shard is missing"),
    "shard outside": (_outside_shard, "stays inside"),
    "gap": (lambda f: _edit_header(f, lambda h: h.pop("model.norm.weight")), "corrupted|no tensor|cut"),
    "huge shape": (
        lambda f: _edit_header(f, lambda h: h["model.norm.bias"].update(shape=[2**50, 2**50])),
        "dimension",
    ),
    "negative": (lambda f: _edit_header(f, lambda h: h["model.norm.bias"].update(shape=[-32])), "dimension"),
    "offsets": (lambda f: _edit_header(f, lambda h: h["model.norm.bias"].update(data_offsets=[0, 2**62])), "hold"),
    "dtype": (lambda f: _edit_header(f, lambda h: h["model.norm.bias"].update(dtype="Q9")), "dtype"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_with_a_sentence(hf_folder: Path, case: str) -> None:
    check_checkpoint(hf_folder)
    breaks, message = BROKEN[case]
    breaks(hf_folder)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(hf_folder)


def test_missing_folder() -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        check_checkpoint(Path("/no/such/place"))


def test_heads_other_than_the_lm_head(tmp_path: Path) -> None:
    config = tiny_config(architectures=["NemotronForQuestionAnswering"])
    state = {name.replace("model.", "transformer."): tensor for name, tensor in random_state(config).items()}
    del state["lm_head.weight"]
    state["qa_outputs.weight"] = torch.zeros(2, 32)
    check_checkpoint(save_reference(tmp_path / "qa", config, state))
