"""Which requests the engine can serve: those that it decodes as transformers' own path does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from ..engine_hook import ENGINE_CHOICE

KNOWN_ARGUMENTS = {
    "attention_mask",
    "past_key_values",
    "position_ids",
    "logits_to_keep",
    "use_cache",
    "synced_gpus",
    "tokenizer",
}


def why_not_request(input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> str:
    """Why the engine cannot serve this request; empty if it can."""
    if ENGINE_CHOICE.get() == "off":
        return 'engine="off"'
    if config.is_assistant:
        return "a draft for transformers' own loop"
    if not input_ids.numel():
        return "no tokens to begin with"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            return name
    if not config.use_cache or config.cache_implementation is not None or kwargs.get("synced_gpus"):
        return "a cache of the caller's choice"
    cache = kwargs.get("past_key_values")
    if cache is not None and not isinstance(cache, DynamicCache):
        return f"a {type(cache).__name__}"
    if cache is not None and cache.get_seq_length() > 0:
        return "a cache that is already filled"
    if cache is not None and any(cache.is_sliding):
        return "a cache with a sliding window"
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in KNOWN_ARGUMENTS)
    return f"argument {unknown[0]}" if unknown else _why_not_mask(input_ids, kwargs)


def _why_not_mask(input_ids: Tensor, kwargs: dict[str, Any]) -> str:
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None:
        mask = torch.ones_like(input_ids)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return "an attention mask that is not one of padding"
    if mask.shape != input_ids.shape or ((mask != 0) & (mask != 1)).any():
        return "an attention mask of another shape or with other values than 0 and 1"
    mask = mask.long()
    expected = mask.cumsum(-1) - 1
    # Padding is on the left: a row that has begun continues to the end.
    if (mask.diff() < 0).any():
        return "an attention mask with holes"
    if not mask[:, -1].all():
        return "a prompt without tokens"
    if positions is not None and (positions.shape != mask.shape or ((positions != expected) & (mask == 1)).any()):
        return "positions of the caller's choice"
    return ""


def starts_of(input_ids: Tensor, kwargs: dict[str, Any]) -> list[int]:
    """The column at which each prompt begins, after its padding."""
    mask = kwargs.get("attention_mask")
    return [0] * len(input_ids) if mask is None else (mask == 0).sum(-1).tolist()
