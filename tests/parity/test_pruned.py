"""Pruned checkpoints where others run them: llama.cpp through our GGUF, and what vLLM asks of names and shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_samples import tiny_config
from prune_samples import random_plan
from safetensors import safe_open
from test_gguf import SHAPE, assert_top_ten, upstream_log_probs, with_tokenizer

from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.gguf.write import write_gguf
from minitron.checkpoint.hf import open_hf, write_hf
from minitron.prune.architecture import Architecture
from minitron.prune.surgery import prune_checkpoint

pytest.importorskip("gguf")

# The shapes of which llama.cpp reads Nemotron: heads * head_dim is the width (its issue #23343).
TARGETS = {
    "width": Architecture(2, 32, 2, 2, 96),
    "groups": Architecture(2, 32, 2, 1, 160),
    "depth": Architecture(1, 64, 4, 2, 160),
    "everything": Architecture(1, 32, 2, 1, 64),
}


@pytest.mark.parametrize("target", TARGETS)
def test_llama_cpp_agrees_with_transformers_on_a_pruned_model(tmp_path: Path, target: str) -> None:
    pytest.importorskip("xllamacpp")
    checkpoint = with_tokenizer(tmp_path, tiny_config(**SHAPE))
    write_hf(checkpoint, tmp_path / "big")
    plan = random_plan(checkpoint.config, TARGETS[target], 6, fingerprint(tmp_path / "big"))
    prune_checkpoint(tmp_path / "big", tmp_path / "small", plan)
    small = open_hf(tmp_path / "small")
    write_gguf(small, tmp_path / "small.gguf", quantization="f32")
    assert_top_ten(tmp_path / "small.gguf", upstream_log_probs(small), 2e-4)


def test_names_shapes_and_config_are_what_vllm_reads(tmp_path: Path) -> None:
    """vLLM's NemotronForCausalLM: `head_dim` from the config, every other width from these keys; q, k and v apart."""
    checkpoint = with_tokenizer(tmp_path, tiny_config(**SHAPE), torch.bfloat16)
    write_hf(checkpoint, tmp_path / "big")
    plan = random_plan(checkpoint.config, Architecture(1, 40, 2, 1, 64), 5, fingerprint(tmp_path / "big"))
    prune_checkpoint(tmp_path / "big", tmp_path / "small", plan)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["architectures"] == ["NemotronForCausalLM"]
    heads, groups, width, hidden = 2, 1, 16, 40
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (heads, groups)
    assert (config["head_dim"], config["hidden_size"]) == (width, hidden)
    expected = {
        "model.embed_tokens.weight": [448, hidden],
        "model.layers.0.self_attn.q_proj.weight": [heads * width, hidden],
        "model.layers.0.self_attn.k_proj.weight": [groups * width, hidden],
        "model.layers.0.self_attn.v_proj.weight": [groups * width, hidden],
        "model.layers.0.self_attn.o_proj.weight": [hidden, heads * width],
        "model.layers.0.mlp.up_proj.weight": [64, hidden],
        "model.layers.0.mlp.down_proj.weight": [hidden, 64],
        "model.layers.0.input_layernorm.weight": [hidden],
        "model.layers.0.input_layernorm.bias": [hidden],
        "model.layers.0.post_attention_layernorm.weight": [hidden],
        "model.layers.0.post_attention_layernorm.bias": [hidden],
        "model.norm.weight": [hidden],
        "model.norm.bias": [hidden],
        "lm_head.weight": [448, hidden],
    }
    # vLLM takes every *.safetensors beside config.json for weights.
    (file,) = (tmp_path / "small").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        assert {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()} == expected  # noqa: SIM118
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
