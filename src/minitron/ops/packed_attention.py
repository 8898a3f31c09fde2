"""Attention for training on a CPU, over packed documents, with a backward pass in plain matrix products.

torch's own (`scaled_dot_product_attention`) looks at every key for every query where there is a mask, and its backward
pass takes twice the time of the forward pass. Here queries go in chunks, which look at the keys up to their own end
only, key/value heads are not repeated, and the weights are kept for the backward pass. Scores, weights and the gradient
of the weights are fp32; what is summed over queries or keys in the backward pass is multiplied in the dtype of the
queries.

Letters of shapes: B batch, T tokens, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..framework import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, sdpa_attention_forward, sdpa_mask
from . import flex_attention
from .autocast import autocast_dtype, without_autocast

NAME = "minitron_packed"
_CHUNK = 64
# Where it was measured to be faster, and the most that the kept weights of one layer may take.
_FEWEST, _MOST = 128, 2048
_KEPT_BYTES = 1 << 27
_HIDDEN = -1e30


@torch.compiler.disable  # a compiled layer calls it as it is: the compiler's own attention is no faster than torch's
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Softmax attention in the form of transformers' attention interface; torch's own where this is not for.

    Args:
        module: as of transformers.
        query: (B, N, T, H); key, value: (B, K, S, H).
        attention_mask: bool (B or 1, 1, T, S), true where a query looks at a key; other forms go to torch's own.
        dropout: other values than 0 go to torch's own.
        scaling: factor on the scores; H ** -0.5 if None.

    Returns:
        Output (B, T, N, H) in the dtype of autocast, or of the query without it; and None.
    """
    if dropout == 0 and attention_mask is not None and serves(query, key, attention_mask):
        dtype = autocast_dtype(query) or query.dtype
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        with without_autocast(query):
            query, key, value = (x.to(dtype) for x in (query, key, value))
            return _PackedAttention.apply(query, key, value, attention_mask, scale), None  # type: ignore[return-value]
    return sdpa_attention_forward(  # type: ignore[return-value]
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
    )


@contextmanager
def packed_attention_in(*models: nn.Module, compiled: bool = False) -> Iterator[None]:
    """Let transformers models on a CPU that use torch's attention use this one, as an attention function.

    Args:
        *models: that are trained.
        compiled: whether their layers are compiled; models on a GPU then use `flex_attention`.
    """
    on_cpu: list[Any] = [m for m in models if next(m.parameters()).device.type == "cpu"]
    changed = [m for m in on_cpu if getattr(m.config, "_attn_implementation", None) == "sdpa"]
    on_gpu: list[Any] = [m for m in models if compiled and flex_attention.serves(m)]
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    flex_attention.register()
    try:
        for model in changed:
            model.set_attn_implementation(NAME)
        for model in on_gpu:
            model.set_attn_implementation(flex_attention.NAME)
        yield
    finally:
        for model in (*changed, *on_gpu):
            model.set_attn_implementation("sdpa")


def kept_bytes(batch: int, heads: int, tokens: int) -> int:
    """Bytes of the weights that one layer keeps for its backward pass; 0 where torch's own attention runs."""
    count = 4 * batch * heads * sum((end - start) * end for start, end in _chunks(tokens))
    return count if _FEWEST <= tokens <= _MOST and count <= _KEPT_BYTES else 0


def serves(query: Tensor, key: Tensor, mask: Tensor) -> bool:
    """Whether this attention is for these tensors: training, on a CPU, causal, of a length where it is faster."""
    B, N, T, _ = query.shape
    if query.device.type != "cpu" or key.shape[2] != T or not kept_bytes(B, N, T):
        return False
    if not (torch.is_grad_enabled() and query.requires_grad):
        return False
    if mask.dtype != torch.bool or mask.shape[1:] != (1, T, T):
        return False
    sees_itself = bool(mask.diagonal(dim1=-2, dim2=-1).all())
    return sees_itself and not any(bool(mask[:, :, start:end, end:].any()) for start, end in _chunks(T))


def _chunks(tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, tokens)) for start in range(0, tokens, _CHUNK)]


class _PackedAttention(torch.autograd.Function):
    """(B, N, T, H) and twice (B, K, T, H) to (B, T, N, H)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        B, N, T, H = query.shape
        K = key.shape[1]
        wide = torch.promote_types(query.dtype, torch.float32)
        grouped = query.reshape(B, K, N // K, T, H)
        keys = key.reshape(B * K, T, H).to(wide).transpose(1, 2)
        values = value.reshape(B * K, T, H).to(wide)
        out = query.new_empty(B, T, K, N // K, H)
        kept = []
        for start, end in _chunks(T):
            some = (grouped[:, :, :, start:end].to(wide) * scale).reshape(B * K, -1, H)
            scores = torch.bmm(some, keys[:, :, :end])
            hidden = mask[:, :, start:end, :end].logical_not()
            scores.view(B, N, end - start, end).masked_fill_(hidden, _HIDDEN)
            weights = torch.softmax(scores, dim=-1)
            summed = torch.bmm(weights, values[:, :end]).view(B, K, N // K, end - start, H)
            out[:, start:end] = summed.permute(0, 3, 1, 2, 4)
            kept.append(weights)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, out, *kept)
        return out.view(B, T, N, H)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, *kept = ctx.saved_tensors
        B, N, T, H = query.shape
        K = key.shape[1]
        wide = torch.promote_types(query.dtype, torch.float32)
        by_head = (0, 2, 3, 1, 4)
        of_out = gradient.reshape(out.shape)
        shift = torch.linalg.vecdot(of_out.to(wide), out.to(wide)).permute(0, 2, 3, 1)  # (B, K, G, T)
        of_out, grouped = of_out.permute(by_head), query.reshape(B, K, N // K, T, H)
        keys = key.reshape(B * K, T, H)
        values = value.reshape(B * K, T, H).to(wide).transpose(1, 2)
        of_query = torch.empty_like(out)
        of_key, of_value = (torch.zeros(B * K, T, H, dtype=wide) for _ in range(2))
        for (start, end), weights in zip(_chunks(T), kept, strict=True):
            wanted = of_out[:, :, :, start:end].reshape(B * K, -1, H)
            some = grouped[:, :, :, start:end].reshape(B * K, -1, H)
            of_scores = torch.bmm(wanted.to(wide), values[:, :, :end])
            of_scores.sub_(shift[:, :, :, start:end].reshape(B * K, -1, 1)).mul_(weights)
            of_scores, weights = of_scores.to(query.dtype), weights.to(query.dtype)
            of_value[:, :end] += torch.bmm(weights.transpose(1, 2), wanted)
            of_key[:, :end] += torch.bmm(of_scores.transpose(1, 2), some)
            part = torch.bmm(of_scores, keys[:, :end]).mul_(ctx.scale).view(B, K, N // K, end - start, H)
            of_query[:, start:end] = part.permute(0, 3, 1, 2, 4)
        of_key = of_key.mul_(ctx.scale).to(key.dtype).view(B, K, T, H)
        of_value = of_value.to(value.dtype).view(B, K, T, H)
        return of_query.view(B, T, N, H).transpose(1, 2), of_key, of_value, None, None
