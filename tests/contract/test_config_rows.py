"""Rows C1 to C10 of docs/contract.md: what the page says about NemotronConfig."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from model_samples import UpstreamConfig, build, tiny, token_ids, upstream, upstream_tiny

from minitron import NemotronConfig, NemotronModel

# The signature of the page, in its order.
PAGE = {
    "vocab_size": 256000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "head_dim": None,
    "num_key_value_heads": None,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "initializer_range": 0.0134,
    "norm_eps": 1e-5,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}


def test_C1_defaults_and_their_order__upstream_lacks_two_attributes() -> None:
    signature = inspect.signature(NemotronConfig.__init__).parameters
    assert {name: signature[name].default for name in list(signature)[1 : len(PAGE) + 1]} == PAGE
    config = NemotronConfig()
    for name, value in PAGE.items():
        if value is not None:
            assert getattr(config, name) == value, name
    for name in ("rope_theta", "partial_rotary_factor"):
        with pytest.raises(AttributeError):
            getattr(UpstreamConfig(), name)


def test_C1_arguments_may_be_positional__upstream_raises() -> None:
    config = NemotronConfig(100, 32, 64, 2, 4)
    assert (config.vocab_size, config.hidden_size, config.num_attention_heads) == (100, 32, 4)
    with pytest.raises((TypeError, ValueError)):
        UpstreamConfig(100, 32)


def test_C2_head_dim_defaults_to_hidden_over_heads() -> None:
    assert NemotronConfig().head_dim == 128
    assert tiny().head_dim == 8
    assert tiny(head_dim=12).head_dim == 12


def test_C3_key_value_heads_default_to_heads__upstream_crashes() -> None:
    assert NemotronConfig().num_key_value_heads == 48
    with torch.device("meta"):
        model = NemotronModel(NemotronConfig(num_hidden_layers=1))
    assert model.layers[0].self_attn.k_proj.weight.shape == (6144, 6144)
    with torch.device("meta"), pytest.raises(TypeError):
        upstream.NemotronModel(UpstreamConfig(num_hidden_layers=1))


def test_C4_the_defaults_are_the_15b_but_for_key_value_heads() -> None:
    # The page says "similar to Nemotron-8B", and "nemotron-15b style" in its example; the numbers are the 15B's.
    default, published = NemotronConfig(), NemotronConfig.preset("nemotron-4-15b")
    shapes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    for name in shapes:
        assert getattr(default, name) == getattr(published, name), name
    assert (default.num_key_value_heads, published.num_key_value_heads) == (48, 8)


def test_C5_hidden_act_is_a_name_or_a_function__upstream_raises() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    ids = token_ids()
    with torch.no_grad():
        by_name = build(hidden_act="relu2")(ids).logits
        by_function = build(hidden_act=lambda x: torch.relu(x).square())(ids).logits
        other = build(hidden_act=doubled)(ids).logits
    torch.testing.assert_close(by_name, by_function)
    assert not torch.allclose(by_name, other)
    with pytest.raises(Exception, match="hidden_act"):
        UpstreamConfig(hidden_act=doubled)


def test_C6_weights_are_drawn_from_a_truncated_normal__upstream_has_tails() -> None:
    std = 0.02
    shape = {"hidden_size": 256, "head_dim": 64, "initializer_range": std}
    ours, theirs = (
        torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "norm" not in n])
        for model in (NemotronModel(tiny(**shape)), upstream.NemotronModel(upstream_tiny(**shape)))
    )
    assert ours.abs().max() <= 3 * std
    assert abs(ours.std() / std - 0.987) < 0.01  # what truncation at three deviations leaves
    assert theirs.abs().max() > 3 * std


def test_C7_partial_rotary_factor_is_the_fraction_of_a_head_that_turns() -> None:
    for fraction, width in ((0.25, 2), (0.5, 4), (1.0, 8)):
        model = build("NemotronModel", partial_rotary_factor=fraction)
        cos, _ = model.rotary_emb(torch.zeros(1), torch.arange(4)[None])
        assert cos.shape == (1, 4, width)


def test_C8_biases_are_where_the_page_says() -> None:
    for attention, mlp in ((True, False), (False, True), (False, False)):
        model = build("NemotronModel", attention_bias=attention, mlp_bias=mlp)
        biased = {name.split(".")[-2] for name, _ in model.layers.named_parameters() if name.endswith(".bias")}
        expected = {"q_proj", "k_proj", "v_proj", "o_proj"} if attention else set()
        expected |= {"up_proj", "down_proj"} if mlp else set()
        assert {name for name in biased if name.endswith("_proj")} == expected


def test_C9_json_round_trip(tmp_path: Path) -> None:
    values = {**PAGE, "head_dim": 96, "num_key_value_heads": 6, "rope_theta": 5e5, "partial_rotary_factor": 0.25}
    config = NemotronConfig(**values)  # type: ignore[arg-type]
    config.save_pretrained(tmp_path)
    again = NemotronConfig.from_pretrained(tmp_path)
    for name, value in values.items():
        assert getattr(again, name) == value, name
    assert NemotronConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()
    # and upstream reads the same model out of it
    theirs = UpstreamConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.25
    assert (theirs.head_dim, theirs.num_key_value_heads) == (96, 6)


def test_C10_use_cache_counts_without_is_decoder() -> None:
    # The page says "only relevant if config.is_decoder=True"; it is relevant always, as it has been in every version.
    ids = token_ids()
    for use_cache in (True, False):
        model = build(use_cache=use_cache)
        assert not getattr(model.config, "is_decoder", False)
        assert (model(ids).past_key_values is not None) == use_cache
