"""Rotary embedding as upstream computes it, for every scaling type; frequencies that stay fp32 (D15)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import build, pair, tiny, token_ids, upstream, upstream_tiny

import minitron
from minitron.model import NemotronRotaryEmbedding

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 16},
}


def parameters(kind: str, partial: float, head_dim: int = 8) -> dict[str, Any]:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "partial_rotary_factor": partial, **SCALINGS[kind]}
    if kind == "longrope":
        pairs = int(head_dim * partial) // 2
        rope["short_factor"] = [1.0 + 0.1 * i for i in range(pairs)]
        rope["long_factor"] = [2.0 + 0.5 * i for i in range(pairs)]
    return rope


@pytest.mark.parametrize("partial", [0.5, 1.0])
@pytest.mark.parametrize("kind", SCALINGS)
def test_tables_and_logits_are_upstreams(kind: str, partial: float) -> None:
    rope = parameters(kind, partial)
    ours, theirs = pair(rope_parameters=dict(rope))
    assert torch.equal(ours.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    assert ours.model.rotary_emb.attention_scaling == theirs.model.rotary_emb.attention_scaling
    # Within the original length, beyond it (dynamic and longrope change their frequencies), and back.
    for length in (8, 96, 8):
        ids = token_ids(length=length)
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, theirs(ids).logits), length


@pytest.mark.parametrize("kind", [kind for kind in SCALINGS if kind != "default"])
def test_scaling_changes_something(kind: str) -> None:
    positions = torch.arange(96)[None]
    tables = [NemotronRotaryEmbedding(tiny(rope_parameters=parameters(k, 0.5))) for k in ("default", kind)]
    plain, scaled = (table(torch.zeros(1), positions)[0] for table in tables)
    assert not torch.allclose(plain, scaled, atol=1e-3)


@pytest.mark.parametrize(
    ("head_dim", "partial", "rotated"), [(8, 0.5, 4), (8, 0.25, 2), (8, 1.0, 8), (8, 0.0, 0), (6, 0.5, 4)]
)
def test_rotated_channels_are_upstreams(head_dim: int, partial: float, rotated: int) -> None:
    config = tiny(head_dim=head_dim, partial_rotary_factor=partial)
    assert config.rotary_dim == rotated
    ours, theirs = pair(head_dim=head_dim, partial_rotary_factor=partial)
    ids = token_ids()
    with torch.no_grad():
        if head_dim % 8 == 0:
            assert torch.equal(ours(ids).logits, theirs(ids).logits)
        else:  # on some processors the order of sums over an odd width depends on where in memory it begins
            found, expected = ours.double()(ids).logits, theirs.double()(ids).logits
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def frequencies(model: Any) -> list[torch.Tensor]:
    rotary = getattr(model, "base_model", model).rotary_emb
    return [rotary.inv_freq, rotary.original_inv_freq]


@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_stay_fp32_by_every_way_to_bf16(kind: str, tmp_path: Path) -> None:
    config = tiny(rope_parameters=parameters(kind, 0.5))
    expected = frequencies(minitron.NemotronForCausalLM(config))[0]
    build(rope_parameters=parameters(kind, 0.5)).save_pretrained(tmp_path)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        built_in_bf16 = minitron.NemotronForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    load = minitron.NemotronForCausalLM.from_pretrained
    ways = {
        "to": minitron.NemotronForCausalLM(config).to(torch.bfloat16),
        "bfloat16": minitron.NemotronForCausalLM(config).bfloat16(),
        "half and back": minitron.NemotronForCausalLM(config).half().float(),
        "from_pretrained": load(tmp_path, dtype=torch.bfloat16),
        "device_map": load(tmp_path, dtype=torch.bfloat16, device_map="cpu"),
        "default dtype": built_in_bf16,
        "from config": minitron.NemotronForCausalLM._from_config(config, dtype=torch.bfloat16),
    }
    for way, model in ways.items():
        for tensor in frequencies(model):
            assert tensor.dtype == torch.float32, way
            assert torch.equal(tensor, expected), way


def test_frequencies_survive_the_meta_device() -> None:
    with torch.device("meta"):
        model = minitron.NemotronForCausalLM(tiny())
    assert model.model.rotary_emb.inv_freq.is_meta
    model = model.to_empty(device="cpu")
    model.init_weights()
    expected = frequencies(minitron.NemotronForCausalLM(tiny()))[0]
    for tensor in frequencies(model):
        assert torch.equal(tensor, expected)


def test_upstream_rounds_its_frequencies_in_bf16() -> None:
    theirs = upstream.NemotronForCausalLM(upstream_tiny()).to(torch.bfloat16)
    assert theirs.model.rotary_emb.inv_freq.dtype == torch.bfloat16


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"rope_type is 'wavy'.*default, .*yarn"):
        minitron.NemotronModel(tiny(rope_parameters={"rope_type": "wavy"}))
