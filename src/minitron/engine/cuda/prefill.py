"""Prefill on the device: matrix products of whole chunks, and SDPA over what the cache has.

Chunks have any length, so nothing is captured: a chunk computes for longer than its kernels take to launch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from ..kv import KeyValues
from ..parts import EngineWeights, LayerWeights
from .steps import TorchSteps, heads_of

CHUNK = 2048
"""Prompt tokens in one forward pass: many for the matrix products, few enough to bound the memory of activations."""


class Prefill:
    """Appends tokens to the KV cache; their logits are not computed."""

    def __init__(self, weights: EngineWeights, kv: KeyValues) -> None:
        self._weights, self._kv, self._steps = weights, kv, TorchSteps()

    def append(self, tokens: list[int], slot: int) -> None:
        """Append tokens to a slot's sequence, in chunks."""
        for start in range(0, len(tokens), CHUNK):
            self._append_chunk(tokens[start : start + CHUNK], slot)

    def _append_chunk(self, tokens: list[int], slot: int) -> None:
        weights, begin = self._weights, self._kv.lengths[slot]
        end, eps = begin + len(tokens), weights.constants.norm_eps
        assert end <= self._kv.capacity, f"{end} tokens in a cache of {self._kv.capacity}"
        device = weights.embed.data.device
        positions = torch.arange(begin, end, device=device)
        x = self._steps.embed(weights, torch.tensor(tokens, device=device))
        for index, layer in enumerate(weights.layers):
            q, k, v = heads_of(self._steps.norm_qkv(x, layer, eps), layer, self._kv.rotary, positions, eps)
            keys, values = self._kv.keys[index][slot], self._kv.values[index][slot]
            keys[:, begin:end] = k.transpose(0, 1)
            values[:, begin:end] = v.transpose(0, 1)
            if index + 1 < len(weights.layers):  # of the last layer only keys and values are needed
                mixed = _attended(q, keys[:, :end], values[:, :end])
                x = self._steps.output(x, mixed, layer)
                x = self._mlp(x, layer, eps)
        self._kv.lengths[slot] = end

    def _mlp(self, x: Tensor, layer: LayerWeights, eps: float) -> Tensor:
        return self._steps.down(x, self._steps.norm_up(x, layer, eps), layer)


def _attended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention (T, N H) of the last T positions: q (T, N, H), keys and values (K, S, H)."""
    out = F.scaled_dot_product_attention(
        q.to(keys.dtype).transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=causal_lower_right(len(q), keys.shape[1]),
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).reshape(len(q), -1)
