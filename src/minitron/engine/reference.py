"""The model over packed weights in plain torch: what the compiled step must equal, and what reads long prompts.

Runs wherever torch does and in any floating dtype. The residual stream is fp32 (fp64 for fp64 weights); matrix
products are in the weights' dtype, which for bf16 is the fast path of torch on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .kv import KeyValues
from .weights import EngineWeights, LayerWeights, Norm

CHUNK = 512
"""Prompt tokens read at a time: enough to keep the cores busy, little enough to bound the memory of activations."""


class ReferenceEngine:
    """Sequences, one in each slot: `read` tokens whose logits nobody wants, `step` over those whose are."""

    def __init__(self, weights: EngineWeights, capacity: int, slots: int = 1) -> None:
        self.weights = weights
        self.kv = KeyValues(weights, capacity, slots)
        self.rotary = weights.rotary_tables(capacity)
        self.active_neurons = 0
        self.seen_neurons = 0

    @torch.inference_mode()
    def read(self, tokens: list[int], slot: int = 0) -> None:
        """Append tokens to a sequence, in chunks."""
        for start in range(0, len(tokens), CHUNK):
            self._forward(tokens[start : start + CHUNK], slot)

    @torch.inference_mode()
    def step(self, tokens: list[int], slot: int = 0) -> Tensor:
        """Append tokens and return the logits (len(tokens), V) after each, in the residual stream's dtype."""
        head = self.weights.head
        normed = _norm(self._forward(tokens, slot, count=True), self.weights.norm, self.weights.config.norm_eps)
        return F.linear(normed.to(head.dtype), head).to(normed.dtype)

    def step_each(self, tokens: list[int], slots: list[int]) -> Tensor:
        """Append a token to each of several sequences; logits (len(tokens), V)."""
        return torch.cat([self.step([token], slot) for token, slot in zip(tokens, slots, strict=True)])

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        self.kv.lengths[slot] = min(length, self.kv.lengths[slot])

    def close(self) -> None:
        """Nothing to give back."""

    def _forward(self, tokens: list[int], slot: int, count: bool = False) -> Tensor:
        """Residual stream (T, D) after the last layer."""
        weights, begin = self.weights, self.kv.lengths[slot]
        end = begin + len(tokens)
        assert end <= self.kv.capacity, f"{end} tokens in a cache of {self.kv.capacity}"
        wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
        x = weights.embed[torch.tensor(tokens)].to(wide)
        for index, layer in enumerate(weights.layers):
            x = x + self._attention(x, layer, (index, slot), begin, end)
            x = x + self._mlp(x, layer, count)
        self.kv.lengths[slot] = end
        return x

    def _attention(self, x: Tensor, layer: LayerWeights, place: tuple[int, int], begin: int, end: int) -> Tensor:
        T, (index, slot) = end - begin, place
        H: int = self.weights.config.head_dim  # type: ignore[assignment]
        normed = _norm(x, layer.attention_norm, self.weights.config.norm_eps).to(layer.q.dtype)
        qkv = torch.cat([F.linear(normed, matrix) for matrix in (layer.q, layer.k, layer.v)], dim=-1).to(x.dtype)
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        qkv = qkv.view(T, -1, H).transpose(0, 1)
        N, K = layer.num_heads, layer.num_key_value_heads
        cos, sin = (table[begin:end].to(x.dtype) for table in self.rotary)
        q = _rotate(qkv[:N], cos, sin).to(normed.dtype)
        keys, values = self.kv.keys[index][slot], self.kv.values[index][slot]
        keys[:, begin:end] = _rotate(qkv[N : N + K], cos, sin).to(keys.dtype)
        values[:, begin:end] = qkv[N + K :].to(values.dtype)
        mask = None
        if begin and T > 1:
            mask = torch.arange(end) <= torch.arange(begin, end)[:, None]
        out = F.scaled_dot_product_attention(
            q[None],
            keys[None, :, :end],
            values[None, :, :end],
            attn_mask=mask,
            is_causal=begin == 0 and T > 1,
            enable_gqa=True,
        )
        out = F.linear(out[0].transpose(0, 1).reshape(T, -1), layer.o).to(x.dtype)
        return out if layer.o_bias is None else out + layer.o_bias

    def _mlp(self, x: Tensor, layer: LayerWeights, count: bool) -> Tensor:
        h = F.linear(_norm(x, layer.mlp_norm, self.weights.config.norm_eps).to(layer.up.dtype), layer.up)
        if layer.up_bias is not None:
            h = (h.to(x.dtype) + layer.up_bias).to(h.dtype)
        h = h.relu_().square_()
        if count:
            self.active_neurons += int(h.count_nonzero())
            self.seen_neurons += h.numel()
        out = (h @ layer.down_t).to(x.dtype)
        return out if layer.down_bias is None else out + layer.down_bias


def _norm(x: Tensor, norm: Norm, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.gain.to(x.dtype), norm.offset.to(x.dtype), eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (heads, T, H) with their first channels turned; channel i turns with channel i + R/2."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], dim=-1)
