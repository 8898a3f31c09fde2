"""Tensors of a folder as parameters: rotary frequencies of old checkpoints, float8, and dtypes that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import random_state, save_reference, tiny_config
from safetensors.torch import load_file
from transformers.models.nemotron.configuration_nemotron import NemotronConfig as TheirConfig
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding

from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.hf import check_checkpoint, open_hf, write_hf
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.sources import Observer
from minitron.config import NemotronConfig
from minitron.heads import NemotronForCausalLM

UP = "model.layers.0.mlp.up_proj.weight"


def upstream_frequencies(config: NemotronConfig) -> torch.Tensor:
    """What the upstream module holds, the one that old checkpoints were saved from."""
    keys = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
    theirs = TheirConfig(**{k: getattr(config, k) for k in keys}, rope_parameters=config.rope_parameters)
    return NemotronRotaryEmbedding(theirs).inv_freq


def with_tensors(folder: Path, config: NemotronConfig, **extra: torch.Tensor) -> Path:
    names = {name.replace("__", "."): tensor for name, tensor in extra.items()}
    return save_reference(folder, config, {**random_state(config), **names})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 10000.0},
        {"rope_theta": 500000.0, "partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
    ids=["default", "whole", "linear"],
)
def test_stored_frequencies_are_compared_and_left_out(tmp_path: Path, rope: dict[str, Any], dtype: torch.dtype) -> None:
    config = tiny_config(**rope)
    stored = upstream_frequencies(config).to(dtype)
    names = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": stored.clone() for i in range(2)}
    folder = save_reference(tmp_path / "old", config, {**random_state(config), **names})
    check_checkpoint(folder)
    checkpoint = open_hf(folder)
    assert not [name for name in checkpoint.tensors if "inv_freq" in name]
    assert any("2 rotary_emb.inv_freq" in note for note in checkpoint.notes)
    write_hf(checkpoint, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(random_state(config))
    assert fingerprint(folder) == fingerprint(tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [lambda f: f * 1.01, lambda f: f[:-1].clone(), lambda f: f.int(), lambda f: f * float("nan"), lambda f: f * 0],
)
def test_other_frequencies_are_left_out_with_a_note(tmp_path: Path, change: Any) -> None:
    config = tiny_config()
    folder = with_tensors(tmp_path / "f", config, model__rotary_emb__inv_freq=change(upstream_frequencies(config)))
    checkpoint = open_hf(folder)
    assert not [name for name in checkpoint.tensors if "inv_freq" in name]
    assert any("inv_freq" in note and "differs from the frequencies" in note for note in checkpoint.notes)


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_widened_exactly(tmp_path: Path, dtype: torch.dtype, as_bin: bool) -> None:
    config = tiny_config(dtype="bfloat16")
    state = {name: tensor.to(dtype) for name, tensor in random_state(config).items()}
    folder = save_reference(tmp_path / "f8", config, state)
    if as_bin:
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    assert check_checkpoint(folder) == torch.bfloat16
    observer = Observer()
    checkpoint = observer.watch(open_hf(folder))  # as conversions do, which look for NaN in each block
    assert all(tensor.dtype == torch.bfloat16 for tensor in checkpoint.tensors.values())
    assert all(torch.equal(checkpoint.tensors[n].load().double(), t.double()) for n, t in state.items())
    assert not observer.not_finite
    loaded = NemotronForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name].double(), tensor.double()) for name, tensor in state.items())


def test_float8_with_scales_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    state[UP] = state[UP].to(torch.float8_e4m3fn)
    folder = save_reference(tmp_path / "f", config, {**state, UP + "_scale_inv": torch.ones(1)})
    with pytest.raises(CheckpointError, match=rf"{UP} is float8_e4m3fn and {UP}_scale_inv scales it"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("dtype", "as_bin"),
    [*((d, b) for d in ("int8", "uint8", "bool", "uint16", "int64") for b in (False, True)), ("complex64", True)],
)
def test_dtypes_that_weights_cannot_have(tmp_path: Path, dtype: str, as_bin: bool) -> None:
    config = tiny_config()
    state = random_state(config)
    state[UP] = state[UP].to(getattr(torch, dtype))
    folder = tmp_path / "f"
    if as_bin:
        save_reference(folder, config, random_state(config))
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_reference(folder, config, state)
    for read in (check_checkpoint, open_hf):
        with pytest.raises(CheckpointError, match=rf"{UP}.*({dtype}|ComplexFloatStorage)"):
            read(folder)


def test_quantized_folders_are_compared_too(tmp_path: Path) -> None:
    """A packed matrix may stand for a dense one; everything else is as config.json says."""
    config = tiny_config()
    state = random_state(config)
    packed = {**state}
    rows, columns = packed.pop(UP).shape
    packed[UP.replace("weight", "qweight")] = torch.zeros(rows // 8, columns, dtype=torch.int32)
    packed[UP.replace("weight", "scales")] = torch.ones(1, columns)

    def folder(name: str, tensors: dict[str, torch.Tensor], **values: Any) -> Path:
        place = save_reference(tmp_path / name, config, tensors)
        path = place / "config.json"
        quantization = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **quantization, **values}))
        return place

    check_checkpoint(folder("good", packed))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        check_checkpoint(folder("vocabulary", packed, vocab_size=97))
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        check_checkpoint(folder("layers", packed, num_hidden_layers=3))
    with pytest.raises(CheckpointError, match=r"up_proj|down_proj"):
        check_checkpoint(folder("wide", packed, intermediate_size=1 << 20))
    missing = {name: tensor for name, tensor in packed.items() if "layers.0.mlp.up_proj" not in name}
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.mlp\.up_proj"):
        check_checkpoint(folder("missing", missing))


def test_transposed_tensors_of_a_torch_file(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    turned = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in state.items()}
    assert not turned[UP].is_contiguous()
    folder = save_reference(tmp_path / "f", config, state)
    (folder / "model.safetensors").unlink()
    torch.save(turned, folder / "pytorch_model.bin")
    tensors = open_hf(folder).tensors
    assert all(torch.equal(torch.cat(list(tensors[n].blocks(999))), t) for n, t in state.items())


def test_an_adapter_beside_a_whole_model_is_refused(tmp_path: Path) -> None:
    folder = save_reference(tmp_path / "f", tiny_config(), random_state(tiny_config()))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": "(a+)+b"}')
    for read in (check_checkpoint, open_hf):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: an adapter beside the weights"):
            read(folder)
