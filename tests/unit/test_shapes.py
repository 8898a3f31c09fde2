"""Shapes and arithmetic of every family against the models that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_samples import CONFIGS, KINDS, RELATIVES, configs, kind_config, small_config, small_model
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from minitron.shapes import describe


@given(config=configs(tuple(CONFIGS)))
@settings(max_examples=60, deadline=None)
def test_every_parameter_has_the_shape_that_upstream_gives_it(config: Any) -> None:
    model, shape = small_model(config), describe(config)
    assert shape.tensor_shapes == {name: tuple(x.shape) for name, x in model.named_parameters()}
    assert shape.num_parameters() == sum(x.numel() for x in model.parameters())
    counts = shape.parameter_counts()
    outside = sum(x.numel() for name, x in model.named_parameters() if "embed_tokens" in name or "lm_head" in name)
    assert shape.num_non_embedding_parameters() == shape.num_parameters() - outside
    norms = sum(x.numel() for name, x in model.named_parameters() if "norm" in name)
    assert counts["norms"] == norms
    assert counts["mlp"] == sum(x.numel() for name, x in model.named_parameters() if ".mlp." in name)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(kind: str) -> None:
    config = kind_config(kind)
    config._attn_implementation = "eager"
    model, shape = small_model(config), describe(config)
    tokens = 8
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    biases = 2 * sum(x.numel() for name, x in model.named_parameters() if "proj.bias" in name)
    expected = tokens * (shape.flops_per_token(tokens) - biases)  # torch counts matrix products only
    frequencies = 2 * tokens * (shape.rotary_dim // 2)  # positions times frequencies, where that is a matrix product
    assert counter.get_total_flops() in (expected, expected + frequencies)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_has_the_stated_bytes(kind: str) -> None:
    config = kind_config(kind)
    model = small_model(config)
    with torch.no_grad():
        cache = model(torch.zeros(1, 6, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 6 * describe(config).kv_bytes_per_token(4)


def test_a_head_size_that_the_file_leaves_out_is_hidden_over_heads() -> None:
    shape = describe(CONFIGS["qwen2"](hidden_size=48, num_attention_heads=4, num_key_value_heads=2))
    assert shape.head_dim == 12
    assert shape.biased == {"query", "key", "value"}


@pytest.mark.parametrize("family", RELATIVES)
def test_heads_that_cannot_rotate_are_refused(family: str) -> None:
    config = small_config(family)
    config.head_dim = 7  # which transformers refuses too, with an error of its own
    with pytest.raises(ValueError, match=r"head_dim is 7; .* must be even"):
        describe(config)
    rope = {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"partial_rotary_factor is 0\.5; .* rotates all channels"):
        describe(small_config(family, rope_parameters=rope))


def test_a_window_is_refused_where_it_hides_tokens_and_only_there() -> None:
    with pytest.raises(ValueError, match=r"sliding_window is 32 .* Set max_position_embeddings to 32"):
        describe(small_config("mistral", sliding_window=32))
    assert describe(small_config("mistral", sliding_window=64)).max_positions == 64
    assert describe(small_config("mistral", sliding_window=None)).layers == 2
    for family in ("qwen2", "qwen3"):
        with pytest.raises(ValueError, match=r"'sliding_attention' in 1 of 2 layers.*use_sliding_window to false"):
            describe(small_config(family, use_sliding_window=True, sliding_window=32, max_window_layers=1))
        describe(small_config(family, use_sliding_window=False, sliding_window=32, max_window_layers=1))
        describe(small_config(family, use_sliding_window=True, sliding_window=32, max_window_layers=2))


def test_the_window_that_mistral_has_by_default_is_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window is 4096 and max_position_embeddings is 131072"):
        describe(CONFIGS["mistral"]())
