"""The model over engine weights in plain torch: what the compiled step must equal.

Runs wherever torch does and in any floating dtype. The residual stream is fp32 (fp64 for fp64 weights); matrix
products are in the weights' dtype, which for bf16 is the fast path of torch on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import DecodeEngine
from .kv import KeyValues
from .matrix import PLAIN_BYTES, Matrix
from .parts import EngineWeights, LayerWeights, Norm

CHUNK = 512
"""Prompt tokens in one forward pass: enough to keep the cores busy, few enough to bound the memory of activations."""

UNPACKED = 1 << 24
"""Weights of a quantized matrix that are unpacked at a time."""


class ReferenceEngine(DecodeEngine):
    """A `DecodeEngine` of torch operations, which runs wherever torch does."""

    name = "reference"

    def __init__(self, weights: EngineWeights, capacity: int, slots: int = 1, kv: KeyValues | None = None) -> None:
        """Allocate the cache for `capacity` tokens in each of `slots` slots, unless there is one to share."""
        self.weights = weights
        self.kv = KeyValues(weights, capacity, slots) if kv is None else kv
        self._active = self._seen = 0

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def active_neurons(self) -> int:
        """MLP neurons that were not zero, over all decoded tokens and layers."""
        return self._active

    @property
    def seen_neurons(self) -> int:
        """All MLP neurons, over all decoded tokens and layers."""
        return self._seen

    def reserve(self, capacity: int) -> None:
        """Let each slot hold at least `capacity` tokens; see `DecodeEngine.reserve`."""
        self.kv.grow(capacity)

    @torch.inference_mode()
    def prefill(self, tokens: list[int], slot: int = 0, more: bool = False) -> None:
        """Append tokens to a slot's sequence, in chunks."""
        for start in range(0, len(tokens), CHUNK):
            self._forward(tokens[start : start + CHUNK], slot)

    @torch.inference_mode()
    def step(self, tokens: list[int], slot: int = 0) -> Tensor:
        """Append tokens and return the logits (len(tokens), V) after each, in the residual stream's dtype."""
        head = self.weights.head
        normed = _norm(self._forward(tokens, slot, count=True), self.weights.norm, self.weights.constants.norm_eps)
        self.hidden = normed.float().numpy()
        return _product(normed, head, self.weights.dtype).to(normed.dtype)

    def prepare(self, prompt: int | None = None) -> None:
        """Nothing to compile."""

    def close(self) -> None:
        """No threads to end."""

    def _forward(self, tokens: list[int], slot: int, count: bool = False) -> Tensor:
        """Residual stream (T, D) after the last layer."""
        weights, begin = self.weights, self.kv.lengths[slot]
        end = begin + len(tokens)
        assert end <= self.kv.capacity, f"{end} tokens in a cache of {self.kv.capacity}"
        wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
        x = weights.embed.select(torch.tensor(tokens), weights.dtype).to(wide)
        for index, layer in enumerate(weights.layers):
            x = x + self._attention(x, layer, index, slot, begin, end)
            x = x + self._mlp(x, layer, count)
        self.kv.lengths[slot] = end
        return x

    def _attention(self, x: Tensor, layer: LayerWeights, index: int, slot: int, begin: int, end: int) -> Tensor:
        T = end - begin
        H = self.weights.constants.head_dim
        dtype = self.weights.dtype
        normed = _norm(x, layer.attention_norm, self.weights.constants.norm_eps).to(dtype)
        qkv = torch.cat([_product(normed, matrix, dtype) for matrix in (layer.q, layer.k, layer.v)], dim=-1).to(x.dtype)
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        qkv = qkv.view(T, -1, H).transpose(0, 1)
        N, K = layer.num_heads, layer.num_key_value_heads
        q, k, v = qkv[:N], qkv[N : N + K], qkv[N + K :]
        if layer.query_norm is not None and layer.key_norm is not None:
            eps = self.weights.constants.norm_eps
            q, k = (_norm(x, Norm(gain, None), eps) for x, gain in ((q, layer.query_norm), (k, layer.key_norm)))
        cos, sin = (table[begin:end].to(x.dtype) for table in self.kv.rotary)
        q = _rotate(q, cos, sin).to(normed.dtype)
        keys, values = self.kv.keys[index][slot], self.kv.values[index][slot]
        keys[:, begin:end] = _rotate(k, cos, sin).to(keys.dtype)
        values[:, begin:end] = v.to(values.dtype)
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
        out = _product(out[0].transpose(0, 1).reshape(T, -1), layer.o, dtype).to(x.dtype)
        return out if layer.o_bias is None else out + layer.o_bias

    def _mlp(self, x: Tensor, layer: LayerWeights, count: bool) -> Tensor:
        dtype = self.weights.dtype
        normed = _norm(x, layer.mlp_norm, self.weights.constants.norm_eps)
        h = _biased(_product(normed, layer.up, dtype), layer.up_bias, x.dtype)
        if layer.gate is None:
            h = h.relu_().square_()
        else:
            h = F.silu(_biased(_product(normed, layer.gate, dtype), layer.gate_bias, x.dtype)) * h
        if count:
            self._active += int(h.count_nonzero())
            self._seen += h.numel()
        down = layer.down.dense(dtype)
        out = (h @ (down if layer.gate is None else down.T)).to(x.dtype)
        return out if layer.down_bias is None else out + layer.down_bias


def _product(x: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """`x @ matrix.T` in the dtype; quantized matrices are unpacked a piece at a time."""
    x = x.to(dtype)
    if matrix.format in PLAIN_BYTES:
        return F.linear(x, matrix.dense(dtype))
    rows = max(1, UNPACKED // matrix.shape[1])
    pieces = ((at, min(at + rows, matrix.shape[0])) for at in range(0, matrix.shape[0], rows))
    return torch.cat([F.linear(x, matrix.dense(dtype, *piece)) for piece in pieces], dim=-1)


def _biased(x: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """x plus a bias, summed in a wider dtype."""
    return x if bias is None else (x.to(wide) + bias).to(x.dtype)


def _norm(x: Tensor, norm: Norm, eps: float) -> Tensor:
    if norm.offset is None:
        return F.rms_norm(x, x.shape[-1:], norm.gain.to(x.dtype), eps)
    return F.layer_norm(x, x.shape[-1:], norm.gain.to(x.dtype), norm.offset.to(x.dtype), eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (heads, T, H) with their first channels rotated; channel i rotates with channel i + R/2."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], dim=-1)
