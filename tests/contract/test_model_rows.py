"""Rows M1 to M13 of docs/contract.md: what the page says about NemotronModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import build, pair, token_ids
from transformers import DynamicCache, StaticCache

from minitron import NemotronCache


@pytest.fixture
def model() -> Any:
    return build("NemotronModel")


@pytest.fixture
def theirs() -> Any:
    return pair("NemotronModel")[1]


@pytest.mark.parametrize("both", [True, False])
def test_M1_exactly_one_of_ids_and_embeddings(model: Any, both: bool) -> None:
    ids = token_ids()
    given = {"input_ids": ids, "inputs_embeds": model.embed_tokens(ids)} if both else {}
    with pytest.raises(
        ValueError, match=f"exactly one of input_ids and inputs_embeds.*{'both' if both else 'neither'}"
    ):
        model(**given)
    alone = model(inputs_embeds=model.embed_tokens(ids)).last_hidden_state
    assert torch.equal(alone, model(ids).last_hidden_state)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_M2_padding_is_ignored(attn: str) -> None:
    model = build("NemotronModel", attn)
    ids = token_ids(length=8)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    changed = ids.clone()
    changed[:, 5:] = 7
    with torch.no_grad():
        a = model(ids, attention_mask=mask).last_hidden_state[:, :5]
        b = model(changed, attention_mask=mask).last_hidden_state[:, :5]
        c = model(ids[:, :5]).last_hidden_state
    assert torch.equal(a, b)
    torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_M2_left_padding_is_ignored(attn: str) -> None:
    model = build("NemotronModel", attn)
    ids = token_ids(length=6)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(padded, attention_mask=mask, position_ids=positions).last_hidden_state[:, 3:]
        assert not got.isnan().any()
        torch.testing.assert_close(got, model(ids).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_M2_a_four_dimensional_mask_is_used_as_it_is(attn: str) -> None:
    model = build("NemotronModel", attn)
    ids = token_ids(length=6)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)
    window = additive.masked_fill(~allowed.triu(-1), torch.finfo(torch.float32).min)
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        torch.testing.assert_close(model(ids, attention_mask=additive).last_hidden_state, plain, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(ids, attention_mask=window).last_hidden_state, plain, atol=1e-2)


def test_M3_positions_are_optional_and_relative(model: Any) -> None:
    # "[0, config.n_positions - 1]": there is no such field, and rotary positions have no end.
    ids = token_ids()
    positions = torch.arange(9).expand(2, -1)
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        assert torch.equal(model(ids, position_ids=positions).last_hidden_state, plain)
        far = model(ids, position_ids=positions + 1000).last_hidden_state
        torch.testing.assert_close(far, plain, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(model(ids, position_ids=positions * 2).last_hidden_state, plain, atol=1e-2)


def test_M3_positions_that_restart_keep_packed_documents_apart(model: Any) -> None:
    ids = token_ids(batch=1, length=9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).last_hidden_state
        apart = torch.cat([model(ids[:, :4]).last_hidden_state, model(ids[:, 4:]).last_hidden_state], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)


def legacy(model: Any, ids: torch.Tensor) -> tuple:
    past = model(ids, use_cache=True).past_key_values
    return tuple(past[layer] for layer in range(len(past)))


def test_M4_past_may_be_a_cache_or_a_tuple__upstream_crashes(model: Any, theirs: Any) -> None:
    ids = token_ids()
    with torch.no_grad():
        full = model(ids).last_hidden_state[:, 5:]
        past = legacy(model, ids[:, :5])
        by_tuple = model(ids[:, 5:], past_key_values=past).last_hidden_state
        by_list = model(ids[:, 5:], past_key_values=[list(entry) for entry in past]).last_hidden_state
        by_cache = model(ids[:, 5:], past_key_values=DynamicCache(past)).last_hidden_state
    assert torch.equal(by_tuple, by_cache)
    assert torch.equal(by_tuple, by_list)
    torch.testing.assert_close(by_tuple, full, rtol=1e-5, atol=1e-5)
    with pytest.raises(AttributeError):
        theirs(ids[:, 5:], past_key_values=past)


def test_M4_a_tuple_of_another_model_is_refused(model: Any) -> None:
    past = legacy(model, token_ids())
    with pytest.raises(ValueError, match="past_key_values has 1 layers; the model has 2"):
        model(token_ids(), past_key_values=past[:1])
    with pytest.raises(ValueError, match=r"past_key_values\[0\] is a Tensor; expected a \(key, value\) pair"):
        model(token_ids(), past_key_values=[past[0][0], past[1][0]])


@pytest.mark.parametrize("use_cache", [True, None, False])
def test_M5_tuple_in_tuple_out__upstream_raises(model: Any, theirs: Any, use_cache: bool | None) -> None:
    ids = token_ids()
    past = legacy(model, ids[:, :5])
    out = model(ids[:, 5:], past_key_values=past, use_cache=use_cache).past_key_values
    assert type(out) is tuple
    assert [len(entry) for entry in out] == [2, 2]
    assert out[0][0].shape == (2, 2, 9, 8)
    assert past[0][0].shape == (2, 2, 5, 8)  # what was given is left alone
    with pytest.raises(AttributeError):
        theirs(ids[:, 5:], past_key_values=past)


def test_M5_empty_tuple_starts_a_legacy_cache(model: Any) -> None:
    out = model(token_ids(), past_key_values=(), use_cache=True).past_key_values
    assert type(out) is tuple
    assert out[1][1].shape == (2, 2, 9, 8)


def test_M5_cache_in_the_same_cache_out(model: Any) -> None:
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        assert model(token_ids(), past_key_values=cache).past_key_values is cache
        assert cache.get_seq_length() == 9


def test_M6_no_cache_in_gives_one_that_reads_like_the_tuple__upstreams_does_not(model: Any, theirs: Any) -> None:
    ids = token_ids()
    past = model(ids).past_key_values
    assert isinstance(past, DynamicCache)  # what transformers 5 expects
    assert isinstance(past, NemotronCache)
    assert len(past) == 2
    keys, values = past[-1]  # what the page promises
    assert keys.shape == values.shape == (2, 2, 9, 8)
    assert past[0][0] is past.layers[0].keys
    with pytest.raises(IndexError, match="layer 2 of a cache of 2 layers"):
        past[2]
    with pytest.raises(TypeError):
        theirs(ids).past_key_values[0]


def test_M7_with_a_cache_only_the_last_ids_are_needed(model: Any) -> None:
    ids = token_ids(length=8)
    with torch.no_grad():
        full = model(ids).last_hidden_state
        past = None
        for t in range(8):
            out = model(ids[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            torch.testing.assert_close(out.last_hidden_state[:, 0], full[:, t], rtol=1e-5, atol=1e-5)


def test_M8_use_cache_decides_whether_a_cache_returns(model: Any) -> None:
    ids = token_ids()
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 9
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids).past_key_values is not None  # config.use_cache


def test_M9_hidden_states_from_embeddings_to_final_norm(model: Any) -> None:
    ids = token_ids()
    out = model(ids, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 9, 32)] * 3
    assert torch.equal(out.hidden_states[0], model.embed_tokens(ids))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_M10_attentions_whatever_the_implementation__upstream_returns_none_with_sdpa(attn: str) -> None:
    ours, theirs = pair("NemotronModel", attn)
    ids = token_ids()
    with torch.no_grad():
        got = ours(ids, output_attentions=True)
        plain = ours(ids)
        reference = pair("NemotronModel", "eager")[1](ids, output_attentions=True)
    assert [a.shape for a in got.attentions] == [(2, 4, 9, 9)] * 2
    for a, b in zip(got.attentions, reference.attentions, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.sum(-1), torch.ones(2, 4, 9))
        assert a.triu(1).abs().max() == 0
    torch.testing.assert_close(got.last_hidden_state, plain.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert ours.config._attn_implementation == attn
    assert len(theirs(ids, output_attentions=True).attentions) == (2 if attn == "eager" else 0)


def test_M10_attentions_with_padding_and_cache(model: Any) -> None:
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    past = model(ids[:, :6], attention_mask=mask[:, :6]).past_key_values
    out = model(ids[:, 6:], attention_mask=mask, past_key_values=past, output_attentions=True)
    assert out.attentions[0].shape == (2, 4, 3, 9)
    assert out.attentions[0][0, :, :, :3].abs().max() == 0


def test_M10_config_asks_for_attentions() -> None:
    model = build("NemotronModel", output_attentions=True)
    assert model.config._attn_implementation == "sdpa"
    assert len(model(token_ids()).attentions) == 2


def test_M11_return_dict_false_gives_a_tuple_without_nones(model: Any) -> None:
    ids = token_ids()
    for out, length in (
        (model(ids, return_dict=False), 2),
        (model(ids, return_dict=False, use_cache=False), 1),
        (model(ids, return_dict=False, output_hidden_states=True, output_attentions=True), 4),
    ):
        assert type(out) is tuple
        assert len(out) == length
        assert all(entry is not None for entry in out)


@pytest.mark.parametrize("asked", [None, "nothing"])
def test_M11_return_dict_none_follows_the_config__upstream_ignores_it(asked: str | None) -> None:
    ours, theirs = pair("NemotronModel")
    ids = token_ids()
    given = {} if asked else {"return_dict": None}
    for model in (ours, theirs):
        model.config.return_dict = False
    assert type(ours(ids, **given)) is tuple
    if not asked:
        assert type(theirs(ids, **given)) is not tuple


def test_M12_cache_position_gives_the_positions__upstream_ignores_it(model: Any, theirs: Any) -> None:
    ids = token_ids(length=4)
    spread = torch.tensor([0, 3, 5, 9])
    with torch.no_grad():
        expected = model(ids, position_ids=spread.expand(2, -1)).last_hidden_state
        assert torch.equal(model(ids, cache_position=spread).last_hidden_state, expected)
        assert torch.equal(theirs(ids, cache_position=spread).last_hidden_state, theirs(ids).last_hidden_state)
        assert not torch.allclose(expected, theirs(ids).last_hidden_state, atol=1e-2)
        # the way of transformers 4: a cache, the new ids, and where they stand
        full = model(token_ids(length=8)).last_hidden_state
        past = model(token_ids(length=8)[:, :6]).past_key_values
        last = model(token_ids(length=8)[:, 6:], past_key_values=past, cache_position=torch.arange(6, 8))
        torch.testing.assert_close(last.last_hidden_state, full[:, 6:], rtol=1e-5, atol=1e-5)


def test_M13_the_configuration_is_at_hand(model: Any) -> None:
    assert model.config.hidden_size == 32
    assert model.config.model_type == "nemotron"
