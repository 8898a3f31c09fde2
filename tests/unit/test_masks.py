"""Masks in every form that callers give, and packed documents, with and without a cache."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from model_samples import CLASSES, pair, scramble, tiny
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

import minitron
from minitron.framework import CACHE_NAME
from minitron.masks import padding_mask

LENGTHS = (5, 9)
STARTS = {"at zero": (0, 0), "later": (0, 3), "earlier": (40, 11), "far ahead": (0, 50)}
CACHES: dict[str, Any] = {
    "default": lambda config: {},
    "no cache": lambda config: {"use_cache": False},
    "empty tuple": lambda config: {"past_key_values": ()},
    "dynamic": lambda config: {"past_key_values": DynamicCache(config=config)},
    "other name": lambda config: {"cache": DynamicCache(config=config)},
    "static": lambda config: {"past_key_values": StaticCache(config=config, max_cache_len=20)},
    "static, full": lambda config: {"past_key_values": StaticCache(config=config, max_cache_len=14)},
}


def documents(start: tuple[int, int] = (0, 0), rows: int = 1) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids (rows, 14), positions (1, 14), and the ids of each document."""
    ids = torch.randint(4, 96, (rows, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(first, first + n) for first, n in zip(start, LENGTHS, strict=True)])[None]
    return ids, positions, list(ids.split(LENGTHS, dim=1))


def build(name: str = "NemotronModel", **config: Any) -> Any:
    return scramble(getattr(minitron, name)(tiny(num_labels=3, max_position_embeddings=128, **config))).double().eval()


def states(out: Any) -> Tensor:
    return torch.stack([out.start_logits, out.end_logits], -1) if "start_logits" in out else next(iter(out.values()))


# --- packed documents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_of_a_row_are_kept_apart(attention: str, start: str, cache: str) -> None:
    model = build(attn_implementation=attention)
    ids, positions, parts = documents(STARTS[start], rows=2)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, **CACHES[cache](model.config)).last_hidden_state
        apart = [
            model(part, position_ids=at, use_cache=False).last_hidden_state
            for part, at in zip(parts, positions.split(LENGTHS, dim=1), strict=True)
        ]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-9, atol=1e-9)


def test_each_row_may_be_packed_in_its_own_way() -> None:
    model = build()
    ids = documents(rows=3)[0]
    lengths = [(14,), (5, 9), (2, 3, 9)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        packed = model(ids, position_ids=positions).last_hidden_state
        for row, parts in enumerate(lengths):
            apart = [model(part, use_cache=False).last_hidden_state for part in ids[row : row + 1].split(parts, dim=1)]
            torch.testing.assert_close(packed[row : row + 1], torch.cat(apart, dim=1), rtol=1e-9, atol=1e-9)


def test_documents_are_kept_apart_in_a_quantized_cache_and_with_attention_weights() -> None:
    model = build().float()
    ids, positions, parts = documents()
    with torch.no_grad():
        first = model(parts[0]).last_hidden_state
        cache = QuantizedCache("quanto", model.config, q_group_size=16)
        quantized = model(ids, position_ids=positions, past_key_values=cache)
        weights = model(ids, position_ids=positions, output_attentions=True).attentions
    torch.testing.assert_close(quantized.last_hidden_state[:, :5], first, rtol=1e-4, atol=1e-4)
    assert all((w[:, :, 5:, :5] == 0).all() and (w[:, :, 5:, 5:].sum(-1) > 0.99).all() for w in weights)


@pytest.mark.parametrize("name", [name for name in CLASSES if "Sequence" not in name])
def test_documents_are_kept_apart_under_every_head(name: str) -> None:
    model = build(name)
    ids, positions, parts = documents()
    with torch.no_grad():
        packed = states(model(ids, position_ids=positions))
        apart = torch.cat([states(model(part)) for part in parts], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-9, atol=1e-9)


def test_the_loss_of_packed_documents_is_that_of_the_documents() -> None:
    model = build("NemotronForCausalLM")
    ids, positions, parts = documents()
    labels = ids.clone()
    labels[:, LENGTHS[0]] = -100  # the last token of a document does not predict the first of the next
    loss = model(ids, position_ids=positions, labels=labels).loss
    of_parts = [model(part, labels=part).loss * (part.shape[1] - 1) for part in parts]
    torch.testing.assert_close(loss, sum(of_parts) / (sum(LENGTHS) - 2))
    loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_documents_are_kept_apart_in_a_compiled_model() -> None:
    model = build(attn_implementation="sdpa").float()
    ids, positions, _ = documents()
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).last_hidden_state
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for cache in ({}, {"use_cache": False}):
            got = compiled(ids, position_ids=positions, **cache).last_hidden_state
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_packed_documents_behind_a_filled_cache_are_refused() -> None:
    model = build("NemotronForCausalLM")
    ids, positions, _ = documents()
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        model(ids[:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match="cache already holds 4 tokens"):
            model(ids, past_key_values=cache, position_ids=positions)
    # Positions that go on one by one are those of one text, wherever they begin.
    past = model(ids[:, :4]).past_key_values
    one_by_one = torch.arange(4, 14)[None]
    full = model(ids).logits[:, 4:]
    torch.testing.assert_close(model(ids[:, 4:], past_key_values=past, position_ids=one_by_one).logits, full)


def test_a_mask_decides_and_says_so() -> None:
    model, theirs = pair("NemotronModel")
    ids, positions, _ = documents()
    mask = torch.ones_like(ids)
    with torch.no_grad(), pytest.warns(UserWarning, match="Leave attention_mask out to keep them apart"):
        ours = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    padded = torch.tensor([[0, 0, 0, *[1] * 11]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # positions of padding may be anything
        model(ids, attention_mask=padded, position_ids=torch.tensor([[1, 1, 1, *range(11)]]))


def test_generate_refuses_packed_prompts() -> None:
    model = build("NemotronForCausalLM")
    ids, positions, _ = documents()
    for engine in ("auto", "off"):
        with pytest.raises(ValueError, match="generate continues one text in each row"):
            model.generate(ids, position_ids=positions, max_new_tokens=2, engine=engine)


# --- masks of padding --------------------------------------------------------------------------------------------

FORMS: dict[str, Any] = {
    "bool": lambda mask: mask.bool(),
    "float32": lambda mask: mask.float(),
    "bfloat16": lambda mask: mask.to(torch.bfloat16),
    "float64": lambda mask: mask.double(),
    "int8": lambda mask: mask.to(torch.int8),
    "uint8": lambda mask: mask.to(torch.uint8),
    "int32": lambda mask: mask.int(),
    "list": lambda mask: mask.tolist(),
    "lists of bools": lambda mask: mask.bool().tolist(),
}
MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "none": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
}


def prompts(mask: Tensor) -> Tensor:
    ids = torch.randint(4, 96, mask.shape, generator=torch.Generator().manual_seed(3))
    return ids.masked_fill(mask == 0, 1)


@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize("form", FORMS)
def test_generate_reads_a_mask_in_every_form(form: str, engine: str) -> None:
    model, theirs = pair("NemotronForCausalLM")
    for name, rows in MASKS.items():
        mask = torch.tensor(rows)
        ids = prompts(mask)
        request: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
        expected = theirs.generate(ids, attention_mask=mask, **request)
        got = model.generate(ids, attention_mask=FORMS[form](mask), engine=engine, **request)
        assert got.tolist() == expected.tolist(), name
        served = model.last_generation.engine != "transformers"
        assert served == (engine == "auto" and name in ("left", "none")), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CLASSES)
def test_forward_reads_a_mask_in_every_form(name: str, attention: str) -> None:
    model = build(name, attn_implementation=attention, pad_token_id=1)
    for kind, rows in MASKS.items():
        mask = torch.tensor(rows)
        ids = prompts(mask)
        with torch.no_grad():
            expected = states(model(ids, attention_mask=mask))
            for form, change in FORMS.items():
                got = states(model(ids, attention_mask=change(mask)))
                assert torch.equal(got, expected), (kind, form)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int8, torch.float64])
def test_forward_reads_masks_of_four_dimensions(dtype: torch.dtype, attention: str) -> None:
    model = build("NemotronForCausalLM", attn_implementation=attention)
    ids = prompts(torch.ones(2, 7, dtype=torch.long))
    seen = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    mask: Tensor = seen.to(dtype)
    if dtype.is_floating_point:
        mask = torch.zeros_like(mask).masked_fill(~seen, torch.finfo(dtype).min)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=1e-9, atol=1e-9)
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions
    assert all((w.masked_select(~seen) == 0).all() for w in weights)


@pytest.mark.parametrize(("mask", "said"), [
    (torch.tensor([[1, 1, 2, 2]]), "attention_mask contains 2"),
    (torch.tensor([[0.0, 0.0, float("-inf"), 0.0]]), "attention_mask contains -inf"),
    (torch.tensor([[1.0, float("nan"), 1.0, 1.0]]), "attention_mask contains nan"),
    (torch.tensor([1, 1, 1, 1]), r"has the shape \(4,\); it must be \(batch, tokens\)"),
    (torch.ones(1, 4, 4), r"has the shape \(1, 4, 4\)"),
    (torch.ones(1, 3), "attention_mask has 3 columns; the cache holds 0 tokens and 4 are new, so it must have 4"),
    (torch.ones(1, 5), "attention_mask has 5 columns"),
])  # fmt: skip
def test_a_mask_that_is_none_of_padding_is_refused(mask: Tensor, said: str) -> None:
    model = build("NemotronForCausalLM")
    ids = torch.tensor([[5, 6, 7, 8]])
    for settings in ({}, {"use_cache": False}):
        with pytest.raises(ValueError, match=said):
            model(ids, attention_mask=mask, **settings)


def test_a_mask_of_the_new_tokens_alone_is_refused_behind_a_cache() -> None:
    model = build("NemotronForCausalLM")
    ids = torch.tensor([[5, 6, 7, 8]])
    out = model(ids)
    with pytest.raises(ValueError, match="has 1 columns; the cache holds 4 tokens and 1 are new, so it must have 5"):
        model(ids[:, :1], attention_mask=torch.ones(1, 1), **{CACHE_NAME: out[CACHE_NAME]})


def test_objects_that_are_no_tensors_come_back_as_they_are() -> None:
    block = object()
    assert padding_mask(block) is block
    assert padding_mask(None) is None
