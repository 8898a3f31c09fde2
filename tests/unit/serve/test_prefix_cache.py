from __future__ import annotations

import random

import torch

from minitron.serve.prefix_cache import PrefixCache

CHUNK = 4
NBYTES = 400


def rows(tokens) -> list[torch.Tensor]:
    """Stands for the keys and values of the last chunk of some tokens: a number made of all of them."""
    return [torch.full((100,), float(hash(tuple(tokens)) % 2**20))]


def fill(cache: PrefixCache, tokens: list[int]) -> None:
    for end in range(CHUNK, len(tokens) + 1, CHUNK):
        cache.insert(tokens[:end], lambda end=end: rows(tokens[:end]))


def test_what_is_found_is_what_was_kept_for_the_same_beginning() -> None:
    """Against a dictionary of all beginnings; memory stays bounded."""
    chance = random.Random(1)
    cache = PrefixCache(CHUNK, 20 * NBYTES)
    hits = 0
    for _ in range(2000):
        tokens = [chance.randrange(2) for _ in range(chance.randint(1, 30))]
        found = cache.find(tokens)
        hits += len(found)
        for index, part in enumerate(found):
            assert torch.equal(part[0], rows(tokens[: (index + 1) * CHUNK])[0])
        fill(cache, tokens)
        assert cache.nbytes <= cache.limit
        assert cache.nbytes == NBYTES * _count(cache)
    assert hits > 300


def _count(cache: PrefixCache) -> int:
    """Chunks that can still be found."""
    nodes, waiting = 0, [cache._root]
    while waiting:
        waiting += (children := list(waiting.pop().children.values()))
        nodes += len(children)
    return nodes


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(CHUNK, 3 * NBYTES)
    first, second, third, fourth = ([number] * CHUNK for number in range(4))
    for tokens in (first, second, third):
        fill(cache, tokens)
    assert cache.find(first)
    fill(cache, fourth)
    assert [bool(cache.find(tokens)) for tokens in (first, second, third, fourth)] == [True, False, True, True]


def test_only_whole_chunks_are_found_and_an_empty_cache_keeps_nothing() -> None:
    cache = PrefixCache(CHUNK, 10 * NBYTES)
    fill(cache, [1] * 8)
    assert [len(cache.find([1] * length)) for length in (3, 4, 7, 8, 9)] == [0, 1, 1, 2, 2]
    cache.clear()
    assert cache.find([1] * 8) == []
    off = PrefixCache(CHUNK, 0)
    fill(off, [1] * 8)
    assert off.find([1] * 8) == []
