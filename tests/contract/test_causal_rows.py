"""Rows L1 to L8 of docs/contract.md: what the page says about NemotronForCausalLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import build, pair, token_ids
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from minitron.framework import CACHE_NAME
from minitron.ops import loss as loss_file
from minitron.outputs import DeferredLogitsOutput


@pytest.fixture
def model() -> Any:
    return build()


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny vocabulary large: every loss takes the way that never holds all logits."""
    monkeypatch.setattr("minitron.heads.CHUNK_VALUES", 96)
    monkeypatch.setattr(loss_file, "CHUNK_VALUES", 96 * 5)


def test_L1_logits_of_every_position(model: Any) -> None:
    assert model(token_ids()).logits.shape == (2, 9, 96)


@pytest.mark.parametrize("way", ["plain", "chunked"])
def test_L2_the_loss_is_shifted_cross_entropy_without_ignored_labels(model: Any, way: str, request: Any) -> None:
    if way == "chunked":
        request.getfixturevalue("chunked")
    ids = token_ids()
    labels = ids.masked_fill(ids % 3 == 0, -100)
    out = model(ids, labels=labels)
    assert isinstance(out, DeferredLogitsOutput) == (way == "chunked")
    logits = model(ids).logits[:, :-1].double()
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert out.loss.shape == ()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", ["plain", "chunked"])
def test_L2_no_label_at_all_gives_zero__upstream_gives_nan(way: str, request: Any) -> None:
    if way == "chunked":
        request.getfixturevalue("chunked")
    ours, theirs = pair()
    ids = token_ids()
    labels = torch.full_like(ids, -100)
    loss = ours(ids, labels=labels).loss
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is None or parameter.grad.abs().max() == 0, name
    assert theirs(ids, labels=labels).loss.isnan()


@pytest.mark.parametrize("wrong", [96, -1, -99])
def test_L3_labels_are_below_the_vocabulary_or_minus_100(model: Any, wrong: int) -> None:
    # "in [0, ..., config.vocab_size]": the bound itself is no label.
    labels = token_ids()
    labels[0, 4] = wrong
    with pytest.raises(ValueError, match=rf"labels contains {wrong}; it must be 0 to 95 or -100"):
        model(token_ids(), labels=labels)


@pytest.mark.parametrize("name", ["num_logits_to_keep", "logits_to_keep"])
def test_L4_keep_last__upstream_ignores_the_pages_name(model: Any, name: str) -> None:
    ids = token_ids()
    full = model(ids).logits
    assert torch.equal(model(ids, **{name: 0}).logits, full)
    for n in (1, 3, 50):
        torch.testing.assert_close(model(ids, **{name: n}).logits, full[:, -n:])
    chosen = torch.tensor([0, 4])
    torch.testing.assert_close(model(ids, **{name: chosen}).logits, full[:, chosen])
    assert pair()[1](ids, num_logits_to_keep=1).logits.shape == (2, 9, 96)


def test_L4_two_names_of_one_argument_must_agree(model: Any) -> None:
    assert model(token_ids(), num_logits_to_keep=2, logits_to_keep=2).logits.shape == (2, 2, 96)
    with pytest.raises(ValueError, match="num_logits_to_keep is 2 and logits_to_keep is 1"):
        model(token_ids(), num_logits_to_keep=2, logits_to_keep=1)
    with pytest.raises(ValueError, match="num_logits_to_keep is -1; it must be 0"):
        model(token_ids(), num_logits_to_keep=-1)


@pytest.mark.parametrize("way", ["plain", "chunked"])
def test_L4_with_labels_the_loss_is_over_all_positions__upstream_raises(way: str, request: Any) -> None:
    if way == "chunked":
        request.getfixturevalue("chunked")
    ours, theirs = pair()
    ids = token_ids()
    out, full = ours(ids, labels=ids, num_logits_to_keep=2), ours(ids, labels=ids)
    assert torch.equal(out.loss, full.loss)
    torch.testing.assert_close(out.logits, full.logits[:, -2:])
    with pytest.raises(ValueError, match="batch_size"):
        theirs(ids, labels=ids, logits_to_keep=2)


@pytest.mark.parametrize("way", ["plain", "chunked"])
def test_L5_num_items_in_batch_divides_the_sum(model: Any, way: str, request: Any) -> None:
    if way == "chunked":
        request.getfixturevalue("chunked")
    ids = token_ids()
    mean = model(ids, labels=ids).loss
    for items in (32, torch.tensor(32)):
        torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=items).loss, mean * 16 / 32)


def test_L5_shifted_labels_may_be_given(model: Any) -> None:
    ids = token_ids()
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:]
    expected = model(ids, labels=ids).loss
    assert torch.equal(model(ids, shift_labels=shifted).loss, expected)
    assert torch.equal(model(ids, labels=ids, shift_labels=shifted).loss, expected)


def test_L6_the_cache_returns_when_asked_for(model: Any) -> None:
    ids = token_ids()
    assert isinstance(model(ids).past_key_values, DynamicCache)
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, labels=ids).past_key_values is not None


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_L7_greedy_generation_is_argmax_of_full_forwards(model: Any, cache: str) -> None:
    ids = token_ids()
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    how = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    got = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=-1, **how)
    assert got.tolist() == expected.tolist()


def test_L8_tied_embeddings_share_the_tensor() -> None:
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert build().lm_head.weight is not build().get_input_embeddings().weight
    ids = token_ids()
    ours, theirs = pair(tie_word_embeddings=True)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    ours(ids, labels=ids).loss.backward()
    theirs(ids, labels=ids).loss.backward()
    torch.testing.assert_close(ours.lm_head.weight.grad, theirs.lm_head.weight.grad, rtol=1e-5, atol=1e-6)


def test_outputs_are_the_classes_and_fields_of_the_page(model: Any) -> None:
    ids = token_ids()
    out = model(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert isinstance(out, CausalLMOutputWithPast)
    assert list(out.keys()) == ["loss", "logits", CACHE_NAME, "hidden_states", "attentions"]
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert type(as_tuple) is tuple
    assert [type(entry).__name__ for entry in as_tuple] == ["Tensor", "Tensor", "NemotronCache"]
    model.config.return_dict = False
    assert type(model(ids)) is tuple


@pytest.mark.parametrize("num_items", [None, 20])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_the_two_ways_to_the_loss_agree(
    tied: bool, num_items: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = token_ids()
    labels = ids.masked_fill(ids % 3 == 0, -100)
    grads = []
    for size in (1 << 25, 96 * 4):
        monkeypatch.setattr("minitron.heads.CHUNK_VALUES", size)
        monkeypatch.setattr(loss_file, "CHUNK_VALUES", size)
        model = build(tie_word_embeddings=tied)
        (model(ids, labels=labels, num_items_in_batch=num_items).loss * 3).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)
