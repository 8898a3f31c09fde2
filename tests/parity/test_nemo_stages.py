"""Rank files with virtual pipeline stages: which piece of the model stands where (Megatron's interleaved schedule)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_samples import random_state, tiny_config
from test_nemo import megatron_state, model_config_yaml

from minitron.checkpoint.detect import detect
from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.nemo.read import open_nemo
from minitron.checkpoint.sources import open_checkpoint

LAYERS, TP, PP, VP = 8, 2, 2, 2
ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_fc1.weight")
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def place_of(layer: int) -> tuple[int, int, int]:
    """Megatron: stage p holds, in its virtual stage v, the layers v * L/V + p * L/(P V) + 0, 1, ..."""
    per_virtual, per_chunk = LAYERS // VP, LAYERS // (PP * VP)
    virtual, rest = divmod(layer, per_virtual)
    stage, number = divmod(rest, per_chunk)
    return stage, virtual, number


def save(folder: Path, tensors: dict[str, torch.Tensor], keys: str, file: str = "model_weights.ckpt") -> None:
    ranks: dict[tuple[int, int], dict[str, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        stage, virtual = (0, 0) if name.startswith("embedding") else (PP - 1, VP - 1)
        if name.startswith("decoder.layers."):
            _, _, number, rest = name.split(".", 3)
            stage, virtual, local = place_of(int(number))
            name = f"decoder.layers.{local}.{rest}"
        axis = 0 if name.endswith(ROWS) else 1 if name.endswith(COLUMNS) else None
        for rank in range(TP):
            part = tensor if axis is None else tensor.chunk(TP, axis)[rank]
            ranks.setdefault((rank, stage), {}).setdefault(keys.format(virtual), {})[f"module.{name}"] = part.clone()
    for (rank, stage), chunks in ranks.items():
        sub = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}" if file.endswith("ckpt") else f"mp_rank_{rank:02d}_{stage:03d}"
        (folder / sub).mkdir(parents=True)
        value: dict[str, Any] = {**chunks, "iteration": 3, "checkpoint_version": 3.0}
        torch.save({"state_dict": value} if "_" in keys else value, folder / sub / file)


@pytest.fixture
def sample() -> tuple[Any, dict[str, torch.Tensor]]:
    config = tiny_config(num_hidden_layers=LAYERS)
    return config, random_state(config, torch.bfloat16)


@pytest.mark.parametrize("keys", ["model{}", "model_{}"])
def test_virtual_stages_are_put_in_order(tmp_path: Path, sample: Any, keys: str) -> None:
    config, state = sample
    save(tmp_path, megatron_state(state, config), keys)
    (tmp_path / "model_config.yaml").write_text(model_config_yaml(config))
    with open_nemo(tmp_path, tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        for name, tensor in checkpoint.tensors.items():
            assert torch.equal(tensor.load(), state[name]), name


def test_folders_of_megatron_lm(tmp_path: Path, sample: Any) -> None:
    """mp_rank_TT_PPP/model_optim_rng.pt, with the configuration from elsewhere."""
    config, state = sample
    save(tmp_path / "iter_3", megatron_state(state, config), "model{}", "model_optim_rng.pt")
    assert detect(tmp_path / "iter_3") == "nemo"
    with pytest.raises(CheckpointError, match="pass --config"), open_checkpoint(tmp_path / "iter_3", tmp_path):
        pass
    with open_checkpoint(tmp_path / "iter_3", tmp_path, config) as checkpoint:
        assert all(torch.equal(tensor.load(), state[name]) for name, tensor in checkpoint.tensors.items())


def test_stages_that_do_not_fit_together(tmp_path: Path, sample: Any) -> None:
    config, state = sample
    save(tmp_path, megatron_state(state, config), "model{}")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump({}))
    path = tmp_path / "tp_rank_00_pp_rank_001" / "model_weights.ckpt"
    value = torch.load(path, weights_only=True)
    torch.save({key: item for key, item in value.items() if key != "model1"}, path)
    with pytest.raises(CheckpointError, match="some are missing"), open_nemo(tmp_path, tmp_path):
        pass
    torch.save({key: item for key, item in value.items() if key != "model0"}, path)
    expected = pytest.raises(CheckpointError, match=r"virtual stages \[1\], expected them from 0")
    with expected, open_nemo(tmp_path, tmp_path):
        pass
