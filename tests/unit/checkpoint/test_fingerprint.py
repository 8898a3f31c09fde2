"""The fingerprint of a model: what changes it, and what must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import random_state, save_reference, tiny_config
from safetensors.torch import load_file, save_file

from minitron.checkpoint.fingerprint import _identity, fingerprint
from minitron.checkpoint.hf import open_hf, write_hf
from minitron.checkpoint.limits import CheckpointError


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def copy_of(folder: Path, out: Path) -> Path:
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def test_layout_does_not_matter(tmp_path: Path, hf_folder: Path) -> None:
    expected = fingerprint(hf_folder)
    assert len(expected) == 64
    assert int(expected, 16) >= 0
    write_hf(open_hf(hf_folder), tmp_path / "shards", max_shard_bytes=20_000)
    assert fingerprint(tmp_path / "shards") == expected

    binary = copy_of(hf_folder, tmp_path / "bin")
    state = load_file(hf_folder / "model.safetensors")
    torch.save(dict(reversed(state.items())), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    assert fingerprint(binary) == expected


def test_spelling_and_notes_of_the_config_do_not_matter(tmp_path: Path, hf_folder: Path) -> None:
    other = copy_of(hf_folder, tmp_path / "other")
    edit_config(other, transformers_version="4.44.0", use_cache=False, initializer_range=1.0, _name_or_path="x")
    values = json.loads((other / "config.json").read_text())
    values["kv_channels"] = values.pop("head_dim")
    values["rope_theta"] = int(values["rope_theta"])
    values.pop("rope_parameters")
    (other / "config.json").write_text(json.dumps(values))
    assert fingerprint(other) == fingerprint(hf_folder)


@pytest.mark.parametrize(
    "change", [{"norm_eps": 1e-6}, {"partial_rotary_factor": 1.0}, {"rope_theta": 1e6}, {"max_position_embeddings": 65}]
)
def test_values_of_the_config_matter(tmp_path: Path, change: dict[str, Any]) -> None:
    state = random_state(tiny_config())
    one = save_reference(tmp_path / "one", tiny_config(), state)
    two = save_reference(tmp_path / "two", tiny_config(**change), state)
    assert fingerprint(one) != fingerprint(two)


def test_every_bit_name_dtype_and_shape_matters(tmp_path: Path, hf_folder: Path) -> None:
    state = load_file(hf_folder / "model.safetensors")
    name, swapped = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    flipped = state[name].clone()
    flipped.view(torch.uint8)[-1, -1] ^= 1
    variants = [
        {**state, name: flipped},
        {**state, name: state[swapped], swapped: state[name]},
        {**state, name: state[name].bfloat16()},
        {**state, name: state[name].reshape(-1)},
        {**state, "extra": torch.zeros(())},
        {**state, "extra": torch.ones(())},
        {key: value for key, value in state.items() if key != name},
    ]
    found = {fingerprint(hf_folder)}
    for number, variant in enumerate(variants):
        folder = copy_of(hf_folder, tmp_path / str(number))
        save_file(variant, folder / "model.safetensors")
        found.add(fingerprint(folder))
    assert len(found) == len(variants) + 1


def test_every_block_of_a_tensor_counts(hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fingerprint(hf_folder)
    monkeypatch.setattr("minitron.checkpoint.fingerprint._BLOCK_BYTES", 256)
    assert fingerprint(hf_folder) == whole
    state = load_file(hf_folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    found = {whole}
    for row in (0, len(state[name]) // 2, -1):
        changed = state[name].clone()
        changed.view(torch.uint8)[row, -1] ^= 1
        folder = copy_of(hf_folder, tmp_path / str(row))
        save_file({**state, name: changed}, folder / "model.safetensors")
        found.add(fingerprint(folder))
    assert len(found) == 4


def test_every_key_that_the_model_computes_with_counts() -> None:
    """Also those whose change shows in the tensors of most checkpoints, such as biases."""
    plain = tiny_config()
    changes: dict[str, Any] = {
        "vocab_size": 999,
        "hidden_size": 999,
        "intermediate_size": 999,
        "num_hidden_layers": 9,
        "num_attention_heads": 9,
        "num_key_value_heads": 9,
        "head_dim": 9,
        "hidden_act": "gelu",
        "max_position_embeddings": 9,
        "norm_eps": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5},
        "attention_bias": not plain.attention_bias,
        "mlp_bias": not plain.mlp_bias,
        "tie_word_embeddings": not plain.tie_word_embeddings,
        "pruned_heads": {0: [1]},
        "quantization_config": {"bits": 4},
    }
    for key, value in changes.items():
        other = tiny_config()
        object.__setattr__(other, key, value)
        assert _identity(other) != _identity(plain), key


def test_tied_embeddings_stored_once_or_twice(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    state = random_state(config)
    state.pop("lm_head.weight", None)
    once = save_reference(tmp_path / "once", config, state)
    twice = {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}
    assert fingerprint(save_reference(tmp_path / "twice", config, twice)) == fingerprint(once)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config"):
        fingerprint(tmp_path)
