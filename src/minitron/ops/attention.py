"""Attention as plain matrix products: the reference, and the only one that returns its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def repeat_groups(x: Tensor, repeats: int) -> Tensor:
    """Repeat each key/value head for the query heads it serves: (B, K, T, H) -> (B, K * repeats, T, H)."""
    if repeats == 1:
        return x
    B, K, T, H = x.shape
    return x[:, :, None].expand(B, K, repeats, T, H).reshape(B, K * repeats, T, H)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, in the form of transformers' attention interface.

    Args:
        module: has `num_key_value_groups`, the query heads per key/value head, and `training`.
        query: (B, N, T, H); key, value: (B, K, S, H) with N = K * num_key_value_groups.
        attention_mask: additive, broadcastable to (B, N, T, S), or None.
        scaling: factor on the scores before the softmax, which runs in fp32 (fp64 for fp64 queries).

    Returns:
        Output (B, T, N, H) and weights (B, N, T, S), both in the dtype of `query`.
    """
    repeats: int = module.num_key_value_groups  # type: ignore[assignment]
    key, value = repeat_groups(key, repeats), repeat_groups(value, repeats)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
