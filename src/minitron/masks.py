"""Attention masks: the forms in which callers give them, and packed documents, which do not attend to each other.

Letters of shapes: B batch, T new tokens, S cached + new tokens, N query heads.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .framework import framework_mask

PACKED_WITH_PAST = (
    "position_ids do not increase one by one within a row, which begins another document, but the cache already holds "
    "{past} tokens, and their documents are not known. Run each document in a row of its own, "
    "or give an attention_mask"
)
PACKED_WITH_MASK = (
    "position_ids restart within a row, but an attention_mask is given, and it decides: the documents of a row attend "
    "to each other. Leave attention_mask out to keep them apart"
)

PACKED_BOTH_WAYS = (
    "position_ids do not increase one by one within a row, which begins another document; with is_causal=False or "
    "bidirectional_layers, documents of a row cannot be kept apart. Run each document in a row of its own"
)


def readable(tensor: Tensor) -> bool:
    """Whether reading the values costs nothing: a plain tensor on the CPU, and nothing is being compiled."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]


def padding_mask(mask: Any) -> Any:
    """A caller's mask, as a tensor (B, S) of integers or bools if it is a padding mask.

    Bools, integers and floats of any width, 1 (true) to attend and 0 for padding, and nested lists of them are the same
    mask. Masks of four dimensions and objects of other types (block masks) come back as they are.

    Raises:
        ValueError: another number of dimensions, or (checked on the CPU) other values than 0 and 1.
    """
    if isinstance(mask, list | tuple):
        mask = torch.tensor(mask)
    if not isinstance(mask, Tensor) or mask.dim() == 4:
        return mask
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)}; it must be (batch, tokens), 1 to attend and 0 for "
            f"padding, or have four dimensions"
        )
    if mask.dtype == torch.bool:
        return mask
    if readable(mask):
        wrong = (mask != 0) & (mask != 1)
        if wrong.any():
            raise ValueError(
                f"attention_mask contains {mask[wrong][0].item()}; with two dimensions it must be 1 (attend) or 0 "
                f"(padding). A mask that is added to the scores has four dimensions"
            )
    return mask if not mask.is_floating_point() else mask.to(torch.bool)


def causal_mask(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Any,
    cache: Any,
    position_ids: Tensor,
    positions_given: bool,
) -> Any:
    """The mask that the layers get, in the form of the attention implementation of `config`; None if it needs none.

    Args:
        inputs_embeds: (B, T, D).
        attention_mask: (B, S), see `padding_mask`; or four dimensions, broadcastable to (B, N, T, S): bools and
            integers choose keys, floats are added to the scores.
        cache: a `Cache`, or None.
        position_ids: (B or 1, T).
        positions_given: whether the caller gave them. If so, and without a mask, a position that is not one more than
            the position before it begins another document; documents do not attend to each other.

    Raises:
        ValueError: a mask of another width than S, or documents behind a cache that is already filled.
    """
    attention_mask = padding_mask(attention_mask)
    T = inputs_embeds.shape[1]
    if isinstance(attention_mask, Tensor):
        if attention_mask.dim() == 4:
            return _four_dimensional(attention_mask, config, inputs_embeds)
        _check_width(attention_mask, cache, T)
        if positions_given and T > 1:
            _warn_of_restarts(attention_mask, position_ids)
    elif not getattr(config, "is_causal", True):
        if positions_given and readable(position_ids) and (position_ids.diff(dim=-1) != 1).any():
            raise ValueError(PACKED_BOTH_WAYS)
    elif attention_mask is None and positions_given and T > 1 and isinstance(cache, Cache):
        return _documents_in_cache(config, inputs_embeds, cache, position_ids)
    return framework_mask(config, inputs_embeds, attention_mask, cache, position_ids)


def restarts(position_ids: Tensor, attention_mask: Tensor) -> bool:
    """Whether positions (B or 1, T) do not increase from one token to the next, both attended to by the mask (B, T)."""
    real = attention_mask.bool()
    return bool(((position_ids.diff(dim=-1) <= 0) & real[:, 1:] & real[:, :-1]).any())


def _four_dimensional(mask: Tensor, config: Any, like: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    mask = mask.to(like.device, torch.bool)
    if config._attn_implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~mask, torch.finfo(like.dtype).min
    )


def _check_width(mask: Tensor, cache: Any, new: int) -> None:
    if cache is not None and not isinstance(cache, DynamicCache):
        return  # columns of other caches may be empty or missing
    past = cache.get_seq_length() if cache is not None else 0
    if isinstance(past, int) and mask.shape[1] != past + new:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns; the cache holds {past} tokens and {new} are new, so it must "
            f"have {past + new}"
        )


def _warn_of_restarts(mask: Tensor, position_ids: Tensor) -> None:
    if readable(mask) and readable(position_ids) and restarts(position_ids, mask[:, -position_ids.shape[1] :]):
        warnings.warn(PACKED_WITH_MASK, stacklevel=2)


def _documents_in_cache(config: Any, inputs_embeds: Tensor, cache: Cache, position_ids: Tensor) -> Any:
    """The mask of new tokens that a cache stores, without a padding mask."""
    positions = position_ids.expand(inputs_embeds.shape[0], -1)
    breaks = positions.diff(dim=-1) != 1
    tracing = torch.compiler.is_compiling() or type(breaks) is not Tensor
    past = cache.get_seq_length()
    if tracing:
        if not isinstance(past, int) or past > 0:  # values cannot be read, and most increase one by one
            return framework_mask(config, inputs_embeds, None, cache, position_ids)
    elif not breaks.any():
        return framework_mask(config, inputs_embeds, None, cache, position_ids)
    elif int(past) > 0:
        raise ValueError(PACKED_WITH_PAST.format(past=int(past)))
    if isinstance(cache, DynamicCache):  # it will hold only the new tokens, as without a cache
        return framework_mask(config, inputs_embeds, None, None, position_ids)
    document = torch.nn.functional.pad(breaks.cumsum(-1), (1, 0))
    new = document.shape[1]

    def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # A cache that is allocated at once has columns after the new tokens.
        return (key < new) & (document[batch, query] == document[batch, key.clamp(max=new - 1)])

    return framework_mask(config, inputs_embeds, None, cache, position_ids, same_document)
