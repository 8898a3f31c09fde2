"""Prefill of long prompts: torch's matrix products over the engine's weights, in memory that all layers share.

Products are in the weights' dtype (bf16 for quantized formats), the residual stream and the norms in fp32. The products
take nearly all the time, so allocations must not add to it: a tensor of some megabytes that is allocated anew consists
of untouched pages, and touching them costs more than the arithmetic. An odd number of rows is padded with one row,
because oneDNN multiplies an odd number of bf16 rows a quarter slower. Nemotron's `down_proj` is used as it is stored,
transposed, which makes its product a twentieth slower. Quantized formats are unpacked by Numba.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..kv import KeyValues
from ..matrix import BLOCK, PLAIN_BYTES, Matrix
from ..parts import EngineWeights, LayerWeights, Norm
from ..reference import CHUNK
from .compiled import compiling
from .formats import KINDS
from .gemv import NONE, share
from .unpack import unpack_rows


class Prefill:
    """Appends tokens to the KV cache; their logits are not computed."""

    def __init__(self, weights: EngineWeights, kv: KeyValues, threads: int) -> None:
        self._weights = weights
        self._kv = kv
        self._threads = threads
        self._rows = 0

    def prepare(self) -> None:
        """Load the compiled code that unpacks matrices from the cache or compile it."""
        if self._weights.format in PLAIN_BYTES or not self._weights.layers:
            return
        matrix = self._weights.layers[0].q
        stored, extras = _stored(matrix)
        with compiling(f"the unpacking of {matrix.format} weights"):
            unpack_rows(stored, extras, np.zeros(BLOCK, np.float32), np.zeros((1, matrix.shape[1]), np.uint16), 0, 0)

    @torch.inference_mode()
    def append(self, tokens: list[int], slot: int) -> None:
        """Append tokens to a slot's sequence, in chunks."""
        self.prepare()
        self._reserve(min(CHUNK, len(tokens)))
        with ThreadPoolExecutor(self._threads) as self._pool:
            for start in range(0, len(tokens), CHUNK):
                self._append_chunk(tokens[start : start + CHUNK], slot)

    def _reserve(self, rows: int) -> None:
        """Allocate the activations of a chunk of so many tokens."""
        rows += rows % 2
        if rows <= self._rows:
            return
        weights, dtype = self._weights, self._weights.dtype
        D, H = weights.hidden_size, weights.constants.head_dim
        heads = max((layer.num_heads for layer in weights.layers), default=0)
        groups = max((layer.num_key_value_heads for layer in weights.layers), default=0)
        self._rows = rows
        self._x, self._wide = torch.empty(rows, D), torch.empty(rows, D)
        self._narrow = torch.empty(rows, D, dtype=dtype)
        self._moments = torch.empty(2, rows, 1)
        self._q, self._k, self._v = (torch.empty(rows * n * H, dtype=dtype) for n in (heads, groups, groups))
        self._turned = torch.empty(3, rows * heads * self._kv.rotary[0].shape[1])
        gated = any(layer.gate is not None for layer in weights.layers)
        self._h, self._gate = (
            torch.empty(rows if used else 0, weights.constants.intermediate_size, dtype=dtype) for used in (True, gated)
        )
        largest = max((m.shape[0] * m.shape[1] for layer in weights.layers for m in layer.matrices), default=0)
        self._plain = torch.empty(0 if weights.format in PLAIN_BYTES else largest, dtype=dtype)

    def _append_chunk(self, tokens: list[int], slot: int) -> None:
        begin, T = self._kv.lengths[slot], len(tokens)
        assert begin + T <= self._kv.capacity, f"{begin + T} tokens in a cache of {self._kv.capacity}"
        rows = T + T % 2
        x = self._x[:rows]
        x[:T] = self._weights.embed.select(torch.tensor(tokens), self._weights.dtype)
        x[T:] = 0
        for index, layer in enumerate(self._weights.layers):
            normed = self._normed(x, layer.attention_norm)
            self._store(normed, layer, index, slot, begin, T)
            if index + 1 < len(self._weights.layers):  # of the last layer only keys and values are needed
                x += self._attention(normed, layer, index, slot, begin, T)
                x += self._mlp(x, layer)
        self._kv.lengths[slot] = begin + T

    def _store(self, normed: Tensor, layer: LayerWeights, index: int, slot: int, begin: int, T: int) -> None:
        """Store keys and values in the cache."""
        N, K = layer.num_heads, layer.num_key_value_heads
        k = self._project(normed, layer.k, self._k, layer.qkv_bias, N)[:T]
        self._norm_heads(k, layer.key_norm)
        self._rotate(k, begin)
        self._kv.keys[index][slot][:, begin : begin + T] = k.transpose(0, 1)
        v = self._project(normed, layer.v, self._v, layer.qkv_bias, N + K)[:T]
        self._kv.values[index][slot][:, begin : begin + T] = v.transpose(0, 1)

    def _project(self, normed: Tensor, matrix: Matrix, scratch: Tensor, bias: Tensor | None, first: int) -> Tensor:
        """Heads (rows, heads, H) in `scratch`; their biases begin at head `first`."""
        H = self._weights.constants.head_dim
        rows, width = len(normed), matrix.shape[0]
        part = scratch[: rows * width].view(rows, width)
        self._multiply(normed, self._dense(matrix).T, part, None if bias is None else bias[first * H :][:width])
        return part.view(rows, -1, H)

    def _attention(self, normed: Tensor, layer: LayerWeights, index: int, slot: int, begin: int, T: int) -> Tensor:
        end, rows = begin + T, len(normed)
        width = layer.q.shape[0]
        q = self._project(normed, layer.q, self._q, layer.qkv_bias, 0)[:T]
        self._norm_heads(q, layer.query_norm)
        self._rotate(q, begin)
        keys, values = self._kv.keys[index][slot], self._kv.values[index][slot]
        mask = torch.arange(end) <= torch.arange(begin, end)[:, None] if begin else None
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None, :, :end],
            values[None, :, :end],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        q.copy_(mixed[0].transpose(0, 1))
        mixed_heads = self._q[: rows * width].view(rows, width)
        return self._multiply(mixed_heads, self._dense(layer.o).T, self._narrow[:rows], layer.o_bias)

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        rows = len(x)
        h, out = self._h[:rows], self._narrow[:rows]
        normed = self._normed(x, layer.mlp_norm)
        self._multiply(normed, self._dense(layer.up).T, h, layer.up_bias)
        if layer.gate is None:
            return self._multiply(h.relu_().square_(), self._dense(layer.down), out, layer.down_bias)
        gate = self._multiply(normed, self._dense(layer.gate).T, self._gate[:rows], layer.gate_bias)
        h.mul_(F.silu(gate, inplace=True))
        return self._multiply(h, self._dense(layer.down).T, out, layer.down_bias)

    def _normed(self, x: Tensor, norm: Norm) -> Tensor:
        rows, D = x.shape
        wide, (mean, scale) = self._wide[:rows], self._moments[:, :rows]
        eps = self._weights.constants.norm_eps
        if norm.offset is None:
            torch.square(x, out=wide)
            torch.mean(wide, -1, keepdim=True, out=scale)
            scale.add_(eps).rsqrt_()
            torch.mul(x, scale, out=wide).mul_(norm.gain)
            return self._narrow[:rows].copy_(wide)
        into = {"out0": wide, "out1": mean, "out2": scale}
        torch.ops.aten.native_layer_norm.out(x, (D,), norm.gain, norm.offset, eps, **into)
        return self._narrow[:rows].copy_(wide)

    def _norm_heads(self, heads: Tensor, gain: Tensor | None) -> None:
        """Divide heads (T, heads, H) by their root mean squares in place, where the model has norms of heads."""
        if gain is not None:
            wide = heads.float()
            scale = wide.square().mean(-1, keepdim=True).add_(self._weights.constants.norm_eps).rsqrt_()
            heads.copy_(wide.mul_(scale).mul_(gain))

    def _rotate(self, heads: Tensor, begin: int) -> None:
        """Rotate the first channels of heads (T, heads, H) in place, as `ops.rope`."""
        T, N, _ = heads.shape
        cos, sin = (table[begin : begin + T, None] for table in self._kv.rotary)
        half = cos.shape[-1]
        a, b = heads[..., :half], heads[..., half : 2 * half]
        new_a, new_b, part = self._turned[:, : T * N * half].view(3, T, N, half)
        torch.mul(a, cos, out=new_a).sub_(torch.mul(b, sin, out=part))
        torch.mul(b, cos, out=new_b).add_(torch.mul(a, sin, out=part))
        a.copy_(new_a)
        b.copy_(new_b)

    def _multiply(self, x: Tensor, dense: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return torch.mm(x, dense, out=out)
        return torch.addmm(bias.to(out.dtype), x, dense, out=out)

    def _dense(self, matrix: Matrix) -> Tensor:
        """The matrix in the dtype of products; a quantized one is unpacked into memory that the next one reuses."""
        if matrix.format in PLAIN_BYTES:
            return matrix.data
        rows, columns = matrix.shape
        dense = self._plain[: rows * columns].view(rows, columns)
        stored, extras = _stored(matrix)
        bits = dense.view(torch.int16).numpy().view(np.uint16)
        row_sizes = np.zeros((self._threads, -(-columns // BLOCK) * BLOCK), np.float32)
        jobs = [
            self._pool.submit(
                unpack_rows, stored, extras, row_sizes[thread], bits, *share(rows, 1, thread, self._threads)
            )
            for thread in range(self._threads)
        ]
        for job in jobs:
            job.result()
        return dense


def _stored(matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """A matrix and its extras as compiled code takes them."""
    extras = NONE if matrix.extras is None else matrix.extras.numpy()
    return matrix.data.numpy().view(KINDS[matrix.format]), extras
