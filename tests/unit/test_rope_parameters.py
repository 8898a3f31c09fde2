"""Parameters of RoPE: either a sentence, or frequencies that upstream computes too and that are numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minitron import NemotronConfig
from minitron.rope_parameters import check_rope

SHAPE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32
    },
    "longrope": {"factor": 2.0, "original_max_position_embeddings": 32},
}  # fmt: skip


def parameters(kind: str, share: float, head_dim: int, **changes: Any) -> dict[str, Any]:
    count = -(-int(head_dim * share) // 2)
    more = {"short_factor": [1.0] * count, "long_factor": [2.0] * count} if kind == "longrope" else {}
    return {"rope_type": kind, "partial_rotary_factor": share, **TYPES[kind], **more, **changes}


@pytest.mark.parametrize(("head_dim", "share"), [(10, 0.5), (6, 0.5), (8, 0.49), (7, 0.5)])
@pytest.mark.parametrize("kind", TYPES)
def test_an_odd_number_of_rotated_channels(kind: str, head_dim: int, share: float) -> None:
    width = int(head_dim * share)
    assert width % 2
    rope = parameters(kind, share, head_dim)
    if kind == "yarn":
        says = (
            rf"head_dim {head_dim} with partial_rotary_factor {share} rotates {width} channels; rope_type 'yarn' needs"
        )
        with pytest.raises(ValueError, match=says):
            NemotronConfig(**SHAPE, head_dim=head_dim, rope_parameters=rope)
        return
    config = NemotronConfig(**SHAPE, head_dim=head_dim, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=8)
    assert frequencies.shape == (width // 2 + 1,)


ODD_VALUES = st.sampled_from(
    [
        None,
        True,
        "4",
        "a",
        0,
        1,
        -1,
        2,
        0.5,
        1.5,
        32,
        10**9,
        1e300,
        math.nan,
        math.inf,
        [],
        [1.0] * 4,
        [0.0] * 4,
        ["a"] * 4,
    ]
)
NAMES = [
    "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings", "short_factor", "long_factor",
]  # fmt: skip


@given(st.sampled_from(sorted(TYPES)), st.sampled_from(NAMES), ODD_VALUES)
@settings(max_examples=400, deadline=None)
def test_any_value_is_a_sentence_or_gives_numbers(kind: str, name: str, value: Any) -> None:
    config = message = None
    try:
        config = NemotronConfig(**SHAPE, head_dim=8, rope_parameters=parameters(kind, 1.0, 8, **{name: value}))
    except ValueError as error:
        message = str(error)
    if config is None:
        assert message is not None
        assert message.startswith("rope_parameters: ")
        assert name in message
        return
    frequencies, attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=8)
    assert torch.isfinite(frequencies).all()
    assert math.isfinite(attention)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_type": ["yarn"]}, "rope_parameters: rope_type is ['yarn']; it must be a name"),
        ({"rope_theta": 1}, "rope_theta is 1; rope_type 'yarn' needs a base greater than 1"),
        ({"factor": math.inf}, "rope_parameters: factor is inf; it must be a number of at least 1 and at most 1e+09"),
    ],
)
def test_other_mistakes(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="rope") as error:
        check_rope({**parameters("yarn", 1.0, 8), "rope_theta": 1e4, **changes}, 8)
    assert str(error.value) == says


def test_null_is_as_if_it_were_not_there() -> None:
    given = parameters("yarn", 1.0, 8, attention_factor=None, beta_fast=None, mscale=None)
    config = NemotronConfig(**SHAPE, head_dim=8, rope_parameters=given)
    plain = NemotronConfig(**SHAPE, head_dim=8, rope_parameters=parameters("yarn", 1.0, 8))
    assert config.rope_parameters == plain.rope_parameters


@pytest.mark.parametrize("field", ["rope_theta", "norm_eps", "initializer_range"])
def test_infinity_is_no_number(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is inf; it must be a number"):
        NemotronConfig(**SHAPE, **{field: math.inf})
