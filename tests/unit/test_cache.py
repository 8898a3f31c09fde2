from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import tiny
from transformers import DynamicCache

from minitron import NemotronCache
from minitron.cache import from_legacy, to_legacy


def entries(layers: int = 2, tokens: int = 3) -> tuple:
    return tuple((torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4)) for _ in range(layers))


def test_legacy_round_trip_keeps_the_tensors() -> None:
    past = entries()
    cache = from_legacy(past, 2)
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 3
    for given, back in zip(past, to_legacy(cache), strict=True):
        assert torch.equal(given[0], back[0])
        assert torch.equal(given[1], back[1])


def test_what_was_given_does_not_grow() -> None:
    past = entries()
    cache = from_legacy(past, 2)
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), layer)
    assert cache.get_seq_length() == 4
    assert past[0][0].shape[2] == 3


def test_indexing_reads_like_the_tuple() -> None:
    past = entries()
    cache = from_legacy(past, 2)
    assert len(cache) == 2
    for layer in (0, 1, -1, -2):
        keys, values = cache[layer]
        assert torch.equal(keys, past[layer][0])
        assert torch.equal(values, past[layer][1])
    for wrong in (2, -3):
        with pytest.raises(IndexError, match=f"layer {wrong} of a cache of 2 layers"):
            cache[wrong]


def test_an_empty_tuple_is_an_empty_cache() -> None:
    for nothing in ((), []):
        cache = from_legacy(nothing, 2)
        assert isinstance(cache, NemotronCache)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("past", "message"),
    [
        (entries(3), "past_key_values has 3 layers; the model has 2"),
        ((None, None), r"past_key_values\[0\] is a NoneType; expected a \(key, value\) pair"),
        ((*entries(1), torch.zeros(1)), r"past_key_values\[1\] is a Tensor"),
        ((entries(1)[0] * 2,) * 2, r"past_key_values\[0\] is a tuple; expected a \(key, value\) pair"),
    ],
)
def test_other_things_are_refused(past: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_legacy(past, 2)


def test_beam_search_operations_keep_the_class() -> None:
    cache = NemotronCache(config=tiny())
    for layer in range(2):
        cache.update(torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8), layer)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    cache.crop(-1)
    assert isinstance(cache, NemotronCache)
    assert cache[1][0].shape == (4, 2, 2, 8)
