"""Presets and arithmetic of the configuration; its keys are tested in tests/contract."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import tiny

from minitron import PRESETS, NemotronConfig, NemotronForCausalLM

# Parameters in billions, as published: NVIDIA's model cards and NeMo, and (all, without embeddings) Table 2 of the
# Minitron paper, arXiv 2407.14679.
PUBLISHED = {
    "minitron-4b": 4.19,
    "minitron-8b": 8.27,
    "nemotron-3-8b": 8.54,
    "nemotron-4-15b": 15.6,
    "nemotron-4-340b": 341.0,
}
PAPER = {"nemotron-4-15b": (15.6, 12.5), "minitron-8b": (8.3, 6.2), "minitron-4b": (4.2, 2.6)}


def rounded_like(value: float, published: float) -> float:
    digits = len(str(published).split(".")[1]) if published < 100 else 0
    return round(value, digits)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    config = NemotronConfig.preset(name)
    with torch.device("meta"):
        model = NemotronForCausalLM(config)
    counted = sum(p.numel() for p in model.parameters())
    assert config.num_parameters() == counted
    assert rounded_like(counted / 1e9, PUBLISHED[name]) == PUBLISHED[name]
    if name in PAPER:
        everything, without = PAPER[name]
        assert round(counted / 1e9, 1) == everything
        assert round(config.num_non_embedding_parameters() / 1e9, 1) == without


def test_every_preset_is_checked() -> None:
    assert set(PRESETS) == set(PUBLISHED)


def test_a_preset_can_be_changed_and_a_wrong_name_gets_a_hint() -> None:
    assert NemotronConfig.preset("minitron-4b", num_hidden_layers=2).num_hidden_layers == 2
    assert NemotronConfig.preset("minitron-4b").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no preset 'minitron-4'; did you mean 'minitron-4b'"):
        NemotronConfig.preset("minitron-4")


shapes = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(4, 40),
        "hidden_size": st.integers(1, 24),
        "intermediate_size": st.integers(1, 30),
        "num_hidden_layers": st.integers(0, 3),
        "num_key_value_heads": st.integers(1, 3),
        "head_dim": st.integers(1, 5).map(lambda half: 2 * half),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "tie_word_embeddings": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 3))
def test_arithmetic_is_the_sum_over_the_model(shape: dict[str, Any], groups: int) -> None:
    config = NemotronConfig(**shape, num_attention_heads=shape["num_key_value_heads"] * groups)
    with torch.device("meta"):
        model = NemotronForCausalLM(config)
    model.tie_weights()
    parts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "lm_head"), 0)
    for name, parameter in model.named_parameters():
        part = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "mlp", "lm_head": "lm_head"}
        key = next((part[word] for word in name.split(".") if word in part), "norms")
        parts[key] += parameter.numel()
    assert config.parameter_counts() == parts
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())


def test_bytes_and_operations_of_the_4b_by_hand() -> None:
    config = NemotronConfig.preset("minitron-4b")
    # 32 layers, 8 key/value heads of 128, keys and values, two bytes each
    assert config.kv_bytes_per_token() == 32 * 8 * 128 * 2 * 2 == 131072
    per_layer = 2 * 3072 * 3072 + 2 * 3072 * 1024 + 2 * 3072 * 9216
    head = 256000 * 3072
    assert config.flops_per_token() == 2 * (32 * per_layer + head)
    assert config.flops_per_token(context=1000) - config.flops_per_token() == 2 * 32 * 2 * 3072 * 1000
    norms = (2 * 32 + 1) * 2 * 3072
    assert config.parameters_read_per_token() == 32 * per_layer + head + norms + 3072


def test_tied_embeddings_are_read_once_and_counted_once() -> None:
    tied, apart = tiny(tie_word_embeddings=True), tiny()
    assert apart.num_parameters() - tied.num_parameters() == 96 * 32
    assert tied.parameters_read_per_token() == apart.parameters_read_per_token()
    assert tied.flops_per_token() == apart.flops_per_token()


def test_copies_and_pickles_are_the_same_configuration() -> None:
    config = tiny(rope_theta=5e4, pruned_heads={"0": [0, 2]})
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.to_dict() == config.to_dict()
        assert twin == config
    assert config.pruned_heads == {0: [0, 2]}
    assert config != tiny()


def test_pruned_heads_survive_json(tmp_path: Path) -> None:
    tiny(pruned_heads={0: [2, 0]}).save_pretrained(tmp_path)
    assert NemotronConfig.from_pretrained(tmp_path).pruned_heads == {0: [0, 2]}


def test_saving_twice_writes_the_same_file(tmp_path: Path) -> None:
    tiny(rope_scaling={"type": "linear", "factor": 2.0}).save_pretrained(tmp_path / "a")
    NemotronConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    a, b = (json.loads((tmp_path / side / "config.json").read_text()) for side in "ab")
    assert a == b


def test_shapes_are_always_written(tmp_path: Path) -> None:
    # A reader with other defaults must not guess them.
    NemotronConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name in ("vocab_size", "hidden_size", "num_key_value_heads", "head_dim", "hidden_act", "norm_eps"):
        assert name in written, name


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    tiny(note_of_mine="x").save_pretrained(tmp_path)
    assert NemotronConfig.from_pretrained(tmp_path).note_of_mine == "x"


def test_eager_copy_leaves_the_original_alone() -> None:
    config = tiny()
    config._attn_implementation = "sdpa"
    twin = config.eager_copy()
    assert (config._attn_implementation, twin._attn_implementation) == ("sdpa", "eager")
    assert twin.rope_parameters == config.rope_parameters
