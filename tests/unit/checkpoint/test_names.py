"""The table of names is a bijection, and QKV rows are a permutation that attention cannot tell from the original."""

from __future__ import annotations

import itertools

import pytest
import torch
from checkpoint_samples import random_state, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.names import gguf_to_hf, hf_shapes, hf_to_gguf, hf_to_megatron, megatron_to_hf, qkv_rows
from minitron.checkpoint.tensors import from_tensor, join_rows


@given(layers=st.integers(0, 130), attention=st.booleans(), mlp=st.booleans(), tied=st.booleans())
@settings(max_examples=25, deadline=None)
def test_bijection(layers: int, attention: bool, mlp: bool, tied: bool) -> None:
    config = tiny_config(num_hidden_layers=layers, attention_bias=attention, mlp_bias=mlp, tie_word_embeddings=tied)
    names = list(hf_shapes(config))
    assert [megatron_to_hf(*hf_to_megatron(name)) for name in names] == names
    assert [gguf_to_hf(hf_to_gguf(name)) for name in names] == names
    assert len({hf_to_megatron(name) for name in names}) == len({hf_to_gguf(name) for name in names}) == len(names)


def test_names_of_transformers() -> None:
    """The parameters that a config asks for are those of transformers' own class."""
    from transformers.models.nemotron import NemotronConfig, NemotronForCausalLM

    for options in ({}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}):
        config = tiny_config(**options)
        model = NemotronForCausalLM(NemotronConfig(**{**config.to_dict(), "rope_scaling": None}))
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            expected.pop("lm_head.weight")
        assert hf_shapes(config) == expected


def test_names_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.NEMOTRON, 3)
    for name in hf_shapes(tiny_config(num_hidden_layers=3)):
        stem, _, kind = name.rpartition(".")
        assert hf_to_gguf(name) == f"{mapping.get_name(stem)}.{kind}"


@pytest.mark.parametrize(
    "name",
    ["", "model.layers.01.mlp.up_proj.weight", "model.layers.0.lm_head.weight", "model.layers.-1.mlp.up_proj.weight",
     "transformer.wte.weight"],
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    for function in (hf_to_megatron, hf_to_gguf, megatron_to_hf, gguf_to_hf):
        with pytest.raises(CheckpointError, match="not the name"):
            function(name)


def test_a_gated_mlp_has_a_name_in_gguf_and_none_in_megatron() -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    assert gguf_to_hf(hf_to_gguf(name)) == name
    with pytest.raises(CheckpointError, match="not the name"):
        hf_to_megatron(name)


@given(groups=st.integers(1, 5), per_group=st.integers(1, 5), width=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_qkv_rows_against_a_reshape(groups: int, per_group: int, width: int) -> None:
    """Megatron views the fused matrix as (groups, queries per group + 2, head_dim, hidden)."""
    hidden, heads = 3, groups * per_group
    fused = torch.arange((heads + 2 * groups) * width * hidden).view(-1, hidden)
    grouped = fused.view(groups, per_group + 2, width, hidden)
    expected = {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}
    rows = qkv_rows(heads, groups, width)
    for part in "qkv":
        assert torch.equal(from_tensor(fused).take_rows(rows[part]).load(), expected[part].reshape(-1, hidden))
    covered = sorted(run for runs in rows.values() for run in runs)
    assert covered[0][0] == 0
    assert covered[-1][1] == fused.shape[0]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))


@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.data())
@settings(max_examples=40, deadline=None)
def test_joined_rows_in_any_window(heights: list[int], data: st.DataObject) -> None:
    tensors = [torch.randn(height, 2) for height in heights]
    whole, lazy = torch.cat(tensors), join_rows([from_tensor(tensor) for tensor in tensors])
    stop = data.draw(st.integers(0, sum(heights)))
    start = data.draw(st.integers(0, stop))
    assert torch.equal(lazy.rows(start, stop), whole[start:stop])
    assert torch.equal(torch.cat([*lazy.blocks(8), whole[:0]]), whole)


def test_random_state_has_every_parameter() -> None:
    assert random_state(tiny_config()).keys() == hf_shapes(tiny_config()).keys()
