"""Keys and values of past tokens: a cache that can be read like the documented tuple, and that tuple itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

# One (key, value) pair per layer, each (batch, key/value heads, tokens, head_dim).
LegacyCache = tuple[tuple[Tensor, Tensor], ...]


class NemotronCache(DynamicCache):
    """A growing cache which can also be indexed as the legacy tuple: `cache[layer][0]` are that layer's keys.

    The page promises "the legacy cache format" to callers who pass no cache; transformers 5 expects a `Cache`.
    This is both.
    """

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        if not -len(self.layers) <= layer < len(self.layers):
            raise IndexError(f"layer {layer} of a cache of {len(self.layers)} layers")
        entry = self.layers[layer]
        return entry.keys, entry.values  # type: ignore[return-value]


def from_legacy(past: LegacyCache | list[Any], num_layers: int) -> NemotronCache:
    """A cache of the tensors of a legacy tuple; an empty tuple gives an empty cache.

    Raises:
        ValueError: the tuple has another number of layers, or an entry that is not a (key, value) pair.
    """
    if len(past) not in (0, num_layers):
        raise ValueError(f"past_key_values has {len(past)} layers; the model has {num_layers}")
    for index, entry in enumerate(past):
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            raise ValueError(f"past_key_values[{index}] is a {type(entry).__name__}; expected a (key, value) pair")
    return NemotronCache([tuple(entry) for entry in past] or None)


def to_legacy(cache: Cache) -> LegacyCache:
    """The tensors of a cache as a tuple of (key, value) pairs, one per layer, without copying."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)  # type: ignore[misc]
