"""NeMo's settings: values of any type are read as what they are, or refused in a sentence."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_samples import random_state, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.nemo.config import (
    config_from_nemo,
    nemo1_config,
    nemo2_model,
    with_class_defaults,
    yaml_values,
    zero_centred_norms,
)
from minitron.checkpoint.nemo.write import write_nemo
from minitron.checkpoint.sources import open_checkpoint
from minitron.checkpoint.tensors import Checkpoint, from_tensor

CONFIG = tiny_config()
GOOD = {
    "NeMo 1": nemo1_config(CONFIG, "float32", None, 128),
    "NeMo 2": yaml_values(nemo2_model(CONFIG, "float32", 128, CONFIG.vocab_size, None))["config"],
}
_SCALED = {"scale_positional_embedding": True, "scale_factor": 8.0, "old_context_len": 32}
BASES = {
    **GOOD,
    "NeMo 1, RoPE scaled": {**GOOD["NeMo 1"], **_SCALED},
    "NeMo 2, RoPE scaled": {**GOOD["NeMo 2"], "_target_": "nemo.collections.llm.gpt.model.llama.Llama31Config"},
    "nothing that has a default": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4},
}
OTHERS = [
    *("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len", "rope_scaling", "rope_scaling_factor"),
    *("num_moe_experts", "activation_func", "rotary_percent", "seq_length", "gated_linear_unit", "vocab_size"),
    *("scale_positional_embedding", "seq_len_interpolation_factor", "transformer_block_type", "_target_"),
]
FIELDS = sorted({*(key for values in GOOD.values() for key in values), *OTHERS})
LLAMA = "nemo.collections.llm.gpt.model.llama.Llama31Config"
ODD: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**400), 10**400),
        st.integers(0, 8),
        st.floats(),
        st.dates(),
        st.sampled_from(["", "x", "false", "8", "rope", "LayerNorm", "relu", LLAMA, "\x1b[2J", "a.Nemotron4Config15B"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.just("_target_"), st.integers()), inner, max_size=3)
    ),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(BASES)), st.dictionaries(st.sampled_from(FIELDS), ODD, min_size=1, max_size=2))
def test_settings_of_any_type_are_read_or_refused(base: str, odd: dict[str, Any]) -> None:
    with contextlib.suppress(CheckpointError):
        values = with_class_defaults({**BASES[base], **odd})
        config_from_nemo(values, 96, "it").to_dict()
        assert zero_centred_norms(values) in (True, False)


def test_the_bases_are_read() -> None:
    for base in BASES.values():
        config_from_nemo(with_class_defaults(base), 96, "it")


@pytest.mark.parametrize("value", [None, {}, [], "x", 10**400, float("inf"), True], ids=lambda value: str(value)[:9])
def test_each_setting_may_be_of_any_type(value: Any) -> None:
    for base in BASES.values():
        for field in FIELDS:
            with contextlib.suppress(CheckpointError):
                config_from_nemo(with_class_defaults({**base, field: value}), 96, "it").to_dict()


def test_a_missing_setting_is_a_default_or_a_sentence() -> None:
    for base in BASES.values():
        for field in FIELDS:
            with contextlib.suppress(CheckpointError):
                config_from_nemo({key: value for key, value in base.items() if key != field}, 96, "it")


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (
            {"layernorm_zero_centered_gamma": "false"},
            "layernorm_zero_centered_gamma is 'false', expected true or false",
        ),
        ({"scale_positional_embedding": "no"}, "scale_positional_embedding is 'no', expected true or false"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling is {'rope_type': 'llama3'}, expected true or false"),
        ({"scale_positional_embedding": True, "scale_factor": None}, "scale_factor is None, expected a number above 0"),
        ({"scale_positional_embedding": True, "old_context_len": float("inf")}, "old_context_len is inf"),
        ({"seq_len_interpolation_factor": 10**400}, "seq_len_interpolation_factor is 1000"),
        ({"ffn_hidden_size": None, "hidden_size": {"a": 1}}, "hidden_size is {'a': 1}, expected a whole number"),
        ({"ffn_hidden_size": None, "hidden_size": "32"}, "hidden_size is '32', expected a whole number"),
        ({"num_layers": "2"}, "num_hidden_layers is '2'"),
        ({"share_embeddings_and_output_weights": "false"}, "tie_word_embeddings is 'false'"),
        ({"normalization": ["LayerNorm"]}, "normalization is "),
        ({"activation": ["a"]}, "activation is ['a']"),
    ],
)
def test_settings_of_a_wrong_type_are_named(odd: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(said)):
        config_from_nemo({**GOOD["NeMo 1"], **odd}, 96, "it")


def nemo(place: Path, state: dict[str, torch.Tensor] | None = None, **odd: Any) -> Path:
    """A NeMo 2 folder; `odd` changes the settings of its model.yaml."""
    tensors = {name: from_tensor(tensor) for name, tensor in (state or random_state(CONFIG)).items()}
    write_nemo(Checkpoint(CONFIG, tensors), place, form="nemo2")
    path = place / "context" / "model.yaml"
    values = yaml.safe_load(path.read_text())
    values["config"] |= odd
    path.write_text(yaml.safe_dump(values))
    return place


@pytest.mark.parametrize("size", [True, "96", 96.0, [96], {}, -1])
def test_a_vocabulary_that_is_no_number_is_refused(tmp_path: Path, size: Any) -> None:
    folder = nemo(tmp_path / "it", vocab_size=size)
    with pytest.raises(CheckpointError, match="vocab_size is "), open_checkpoint(folder, tmp_path):
        pass


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1)])
@pytest.mark.parametrize(
    "name", ["embedding.word_embeddings.weight", "decoder.layers.0.self_attention.linear_qkv.weight"]
)
def test_a_parameter_that_is_no_vector_or_matrix_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(GOOD["NeMo 1"]))
    others = {
        "embedding.word_embeddings.weight": torch.zeros(96, 32),
        "decoder.final_layernorm.weight": torch.zeros(32),
    }
    state = {f"model.{key}": value for key, value in {**others, name: torch.zeros(shape)}.items()}
    torch.save(state, tmp_path / "model_weights.ckpt")
    with pytest.raises(CheckpointError, match="expected a vector or a matrix"), open_checkpoint(tmp_path, tmp_path):
        pass
