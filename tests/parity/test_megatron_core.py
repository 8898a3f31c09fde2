"""Checkpoints exchanged with megatron-core itself.

`make oracles` runs these. It installs megatron-core apart from the test tools; MINITRON_MEGATRON names the folder.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_samples import random_state, tiny_config

from minitron.checkpoint.archive import FolderSink
from minitron.checkpoint.nemo.read import open_nemo
from minitron.checkpoint.nemo.write import megatron_stacks, write_torch_dist
from minitron.checkpoint.tensors import Checkpoint, from_tensor
from minitron.config import NemotronConfig

HERE = os.environ.get("MINITRON_MEGATRON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not HERE and importlib.util.find_spec("megatron") is None,
        reason="megatron-core is not installed; make oracles runs this (MINITRON_MEGATRON)",
    ),
]
SETTINGS = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "num_query_groups": 2,
            "kv_channels": 24, "rotary_percentage": 0.5, "normalization": "layernorm", "activation": "squared-relu",
            "vocab_size": 384, "max_position_embeddings": 64, "position_embedding_type": "rope"}  # fmt: skip
IDS = [1, 5, 9, 200, 33, 383]


def worker(*arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
    script = str(Path(__file__).with_name("megatron_worker.py"))
    environment = {**os.environ, "PYTHONPATH": path, "WORKER_PORT": port, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_tensor_parallel_bf16_of_megatron_core(tmp_path: Path) -> None:
    """Two ranks, bf16, norms as gamma: what megatron-core writes is read bit for bit."""
    folder = tmp_path / "nemo"
    folder.mkdir()
    worker("save", str(folder), "2")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(SETTINGS))
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    with open_nemo(folder, tmp_path) as checkpoint:
        found = {name: tensor.load() for name, tensor in checkpoint.tensors.items()}
    for layer in range(2):
        theirs, ours = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        # A rank holds one of the two groups: its two queries, its key, its value.
        fused = [rank[f"{theirs}self_attention.linear_qkv.weight"].view(4, 24, 64) for rank in ranks]
        for part, rows in (("q", slice(0, 2)), ("k", slice(2, 3)), ("v", slice(3, 4))):
            expected = torch.cat([each[rows].reshape(-1, 64) for each in fused])
            assert torch.equal(found[f"{ours}self_attn.{part}_proj.weight"], expected)
        for name, other, axis in (
            ("self_attn.o_proj", "self_attention.linear_proj", 1),
            ("mlp.up_proj", "mlp.linear_fc1", 0),
            ("mlp.down_proj", "mlp.linear_fc2", 1),
        ):
            expected = torch.cat([rank[f"{theirs}{other}.weight"] for rank in ranks], axis)
            assert torch.equal(found[f"{ours}{name}.weight"], expected)
        assert torch.equal(found[f"{ours}input_layernorm.weight"], ranks[0][f"{theirs}input_layernorm.weight"] - 1)
    for name, other in (("model.embed_tokens", "embedding.word_embeddings"), ("lm_head", "output_layer")):
        assert torch.equal(found[f"{name}.weight"], torch.cat([rank[f"{other}.weight"] for rank in ranks]))


def test_megatron_core_loads_and_runs_what_we_write(tmp_path: Path) -> None:
    from transformers.models.nemotron import NemotronConfig as UpstreamConfig
    from transformers.models.nemotron import NemotronForCausalLM

    config: NemotronConfig = tiny_config(vocab_size=384, hidden_size=64, intermediate_size=160, num_attention_heads=4,
                                         num_key_value_heads=2, head_dim=24)  # fmt: skip
    state = random_state(config)
    # The norm of megatron-core's local layers has no zero-centred gamma: give it gamma itself.
    stored = {name: tensor + 1 if name.endswith("norm.weight") else tensor for name, tensor in state.items()}
    checkpoint = Checkpoint(config, {name: from_tensor(tensor) for name, tensor in stored.items()})
    write_torch_dist(FolderSink(tmp_path), "model_weights", "model.", megatron_stacks(checkpoint))
    worker("load", str(tmp_path))
    model = NemotronForCausalLM(UpstreamConfig(**{**config.to_dict(), "rope_scaling": None})).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=2e-6)
