"""The last decoder layer at some positions only; of the other positions it needs nothing but keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..families import family_of
from ..framework import CACHE_NAME, given_cache, update_cache
from ..ops.rope import apply_rotary


@contextmanager
def last_layer_at(model: Any, positions: Tensor) -> Iterator[None]:
    """Within this block, `model` returns the hidden states (B, n, D) at `positions` (n,) of each row.

    A hook on the last layer shortens its input. Masks are additive, or None for the causal one.
    """

    def shorten(layer: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
        (hidden,) = args
        position_ids, rotary = kwargs["position_ids"], kwargs["position_embeddings"]
        cache = given_cache(kwargs.pop("past_key_values", None), kwargs)
        kwargs |= {
            CACHE_NAME: _AllKeyValues(*_key_values(layer, hidden, rotary, cache)),
            "attention_mask": _mask_at(kwargs["attention_mask"], positions, position_ids, hidden),
            "position_ids": position_ids[:, positions],
            "position_embeddings": tuple(table[:, positions] for table in rotary),
        }
        return (hidden[:, positions],), kwargs

    hook = model.layers[-1].register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class _AllKeyValues:
    """In place of a cache: keys and values (B, K, S, H) of all positions, of which the layer computes some again."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._found = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._found


def _key_values(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: Any) -> tuple[Tensor, Tensor]:
    """Keys and values (B, K, S, H) of the layer's input (B, T, D), behind those in the cache, which gets them too."""
    attention = layer.self_attn
    part = {part.role: layer.get_submodule(part.name) for part in family_of(attention.config).layer}
    normed = part["attention_norm"](hidden)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys, values = part["key"](normed).view(shape), part["value"](normed).view(shape).transpose(1, 2)
    if "key_norm" in part:
        keys = part["key_norm"](keys)
    keys = apply_rotary(keys[:, :, :0], keys, *rotary)[1].transpose(1, 2)
    return (keys, values) if cache is None else update_cache(cache, keys, values, attention.layer_idx, {})


def _mask_at(mask: Tensor | None, positions: Tensor, position_ids: Tensor, like: Tensor) -> Tensor:
    """Rows (B or 1, 1, n, S) of an additive mask at the positions; without a mask, of the causal one."""
    if mask is not None:
        return mask[:, :, positions]
    last = position_ids[0, positions, None]
    hidden = torch.arange(int(position_ids[0, -1]) + 1, device=like.device) > last
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
        hidden, torch.finfo(like.dtype).min
    )[None, None]
