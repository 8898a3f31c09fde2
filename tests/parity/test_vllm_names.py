"""What vLLM reads of a checkpoint, by its loaders of nemotron, llama and qwen: names, shapes and keys of config.json.

vLLM stacks q, k and v (and gate and up) itself, takes `head_dim` from the configuration where it is there, and reads
`rope_theta` and `partial_rotary_factor` at the top level (versions up to 0.9) or in `rope_parameters` (later ones).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from family_samples import KINDS, kind_config, small_model
from safetensors import safe_open

from minitron.assets import bundled_model
from minitron.train.export import export_model

BIASED = {"nemotron": "attention_bias", "llama": "attention_bias", "qwen3": "attention_bias"}


def expected(config: dict[str, Any]) -> dict[str, list[int]]:
    """Every parameter that vLLM makes, before it stacks some, by the numbers in config.json alone."""
    kind, D, F, V = config["model_type"], config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or D // heads
    nemotron = kind == "nemotron"
    found = {"model.embed_tokens.weight": [V, D], "model.norm.weight": [D]}
    if nemotron:
        found["model.norm.bias"] = [D]
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = [V, D]
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{norm}.weight"] = [D]
            if nemotron:
                found[f"{at}{norm}.bias"] = [D]
        rows = {"q": heads * width, "k": groups * width, "v": groups * width}
        for name, count in rows.items():
            found[f"{at}self_attn.{name}_proj.weight"] = [count, D]
            if kind == "qwen2" or config.get(BIASED.get(kind, ""), False):
                found[f"{at}self_attn.{name}_proj.bias"] = [count]
        found[f"{at}self_attn.o_proj.weight"] = [D, heads * width]
        if kind != "qwen2" and config.get(BIASED.get(kind, ""), False):
            found[f"{at}self_attn.o_proj.bias"] = [D]
        if kind == "qwen3":
            found |= {f"{at}self_attn.{name}_norm.weight": [width] for name in "qk"}
        for name in ("up", *(() if nemotron else ("gate",))):
            found[f"{at}mlp.{name}_proj.weight"] = [F, D]
            if config.get("mlp_bias"):
                found[f"{at}mlp.{name}_proj.bias"] = [F]
        found[f"{at}mlp.down_proj.weight"] = [D, F]
        if config.get("mlp_bias"):
            found[f"{at}mlp.down_proj.bias"] = [D]
    return found


def check(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == expected(config)  # noqa: SIM118
    return config


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_exported_model_has_what_vllm_loads(kind: str, tmp_path: Path) -> None:
    export_model(small_model(kind_config(kind)), tmp_path / "model")
    config = check(tmp_path / "model")
    assert config["architectures"][0].endswith("ForCausalLM")


def test_the_bundled_models_have_it_with_heads_that_a_width_does_not_determine() -> None:
    for name in ("default", "half"):
        folder = bundled_model(name) if name == "half" else bundled_model("half").parent / "default"
        config = check(folder)
        assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == 0.5
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
        assert (config["hidden_act"], config["norm_eps"]) == ("relu2", 1e-5)
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
