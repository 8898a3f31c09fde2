"""The fused pieces of a decode step in plain torch: what every kernel must equal, and what runs where there is none.

One decode step appends M tokens, each to the sequence of its slot. Shapes do not depend on the sequences, nothing waits
for the device, and all memory that outlives the step is given, so that a step can be captured as a CUDA graph. The
residual stream is fp32; matrix products are in the weights' dtype, or dequantized into it. Letters of shapes are those
of `engine.parts`, and M rows.

`TorchSteps` is the reference. Kernels plug in as a subclass that replaces some of its methods; see `triton_steps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..matrix import PLAIN_BYTES, Matrix
from ..parts import EngineWeights, LayerWeights, Norm

if TYPE_CHECKING:
    from ..kv import KeyValues


@dataclass(frozen=True)
class Rows:
    """The new tokens of a step. The tensors keep their memory from step to step; the numbers belong to the graph."""

    tokens: Tensor
    """(M,) int64."""
    positions: Tensor
    """(M,) int64: where each token's keys and values are written. Rows that only fill up the batch write to a position
    that no sequence uses, see `DeviceKeyValues`."""
    slots: Tensor
    """(M,) int64. Several rows of one slot have consecutive positions, so a row may attend to keys of this step."""
    ends: Tensor
    """(M,) int64: a row attends to the positions of its slot before this one: its own + 1; 1 for rows that fill up."""
    span: int
    """At least the largest of `ends`."""
    in_order: bool
    """Row m is the only one of slot m, for every m."""


@dataclass(frozen=True)
class Activations:
    """What the first half of an MLP hands to the second half."""

    values: Tensor
    """(M, F), in the weights' dtype."""
    active: Tensor | None = None
    """(M,) int64: how many of each row are not zero; None where they are not counted."""
    index: Tensor | None = None
    """(F / block, block) int32: in each block the neurons that are not zero in every row, rising, then -1."""
    counts: Tensor | None = None
    """(F / block,) int32: how many of a block's indices are valid."""


class TorchSteps:
    """The pieces of a decode step, as torch operations on any device."""

    name = "torch"

    def embed(self, weights: EngineWeights, tokens: Tensor) -> Tensor:
        """Rows of the embedding for tokens (M,): the residual stream (M, D) fp32."""
        embed = weights.embed
        picked = Matrix(embed.format, (len(tokens), embed.shape[1]), embed.data[tokens])
        return picked.dense(weights.dtype).float()

    def norm_qkv(self, x: Tensor, layer: LayerWeights, eps: float) -> Tensor:
        """Norm of x (M, D), then queries, keys and values side by side with their biases: (M, (N + 2 K) H) fp32."""
        normed = norm(x, layer.attention_norm, eps)
        qkv = torch.cat([product(normed, matrix) for matrix in (layer.q, layer.k, layer.v)], dim=-1)
        return qkv if layer.qkv_bias is None else qkv + layer.qkv_bias

    def attention(
        self,
        qkv: Tensor,
        layer: LayerWeights,
        keys: Tensor,
        values: Tensor,
        rotary: tuple[Tensor, Tensor],
        rows: Rows,
        eps: float,
    ) -> Tensor:
        """Norms of heads, rotation, the new keys and values into the cache, attention: (M, N H) in the cache's dtype.

        Args:
            qkv: (M, (N + 2 K) H), see `norm_qkv`.
            layer: of which the numbers of heads and the gains of query_norm and key_norm are used.
            keys: (slots, K, capacity, H) of this layer; each row's are written at its slot and position.
            values: as `keys`.
            rotary: cosines and sines (capacity, R / 2) fp32.
            rows: where each row belongs, and how far back it attends.
            eps: of the norms of heads.
        """
        M, N, K = len(qkv), layer.num_heads, layer.num_key_value_heads
        q, k, v = heads_of(qkv, layer, rotary, rows.positions, eps)
        keys[rows.slots, :, rows.positions] = k.to(keys.dtype)
        values[rows.slots, :, rows.positions] = v.to(values.dtype)
        past = [part[:M] if rows.in_order else part[rows.slots] for part in (keys, values)]
        seen = torch.arange(rows.span, device=qkv.device) < rows.ends[:, None]
        # The queries of one key head are rows of one attention, so that no key is copied for each of them.
        mixed = F.scaled_dot_product_attention(
            q.to(keys.dtype).view(M, K, N // K, -1),
            past[0][:, :, : rows.span],
            past[1][:, :, : rows.span],
            attn_mask=seen[:, None, None].expand(M, K, N // K, rows.span),
        )
        return mixed.reshape(M, -1)

    def output(self, x: Tensor, mixed: Tensor, layer: LayerWeights) -> Tensor:
        """x (M, D) fp32 plus the output projection of attended heads (M, N H), with its bias."""
        return x + biased(product(mixed, layer.o), layer.o_bias)

    def norm_up(self, x: Tensor, layer: LayerWeights, eps: float) -> Activations:
        """Norm of x (M, D), up (and gate) projection with biases, and the activation: squared ReLU, or SiLU of the gate
        times up."""
        normed = norm(x, layer.mlp_norm, eps)
        up = biased(product(normed, layer.up), layer.up_bias)
        if layer.gate is not None:
            gate = biased(product(normed, layer.gate), layer.gate_bias)
            return Activations((F.silu(gate) * up).to(dtype_of(layer.up)))
        h = up.relu().square().to(dtype_of(layer.up))
        # A kernel more in each layer: counted where nothing is captured.
        return Activations(h, None if h.is_cuda else h.count_nonzero(dim=1))

    def down(self, x: Tensor, h: Activations, layer: LayerWeights) -> Tensor:
        """x (M, D) fp32 plus the down projection of the activations, with its bias.

        Neurons that are zero in every row add nothing, so kernels need not read their rows of `layer.down`.
        """
        if layer.gate is not None:
            return x + biased(product(h.values, layer.down), layer.down_bias)
        dtype = dtype_of(layer.down)
        return x + biased((h.values.to(dtype) @ layer.down.dense(dtype)).float(), layer.down_bias)

    def head(self, x: Tensor, weights: EngineWeights) -> tuple[Tensor, Tensor]:
        """The last norm of x (M, D), (M, D) fp32, and logits (M, V) fp32."""
        hidden = norm(x, weights.norm, weights.constants.norm_eps)
        return hidden, product(hidden, weights.head)


def decode_step(
    steps: TorchSteps, weights: EngineWeights, kv: KeyValues, rows: Rows
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append a token to the sequence of each row.

    Returns:
        the last hidden states (M, D) fp32, logits (M, V) fp32, and how many MLP neurons of each row were not zero,
        (M,) int64, None if they are not counted.
    """
    x, eps, active = steps.embed(weights, rows.tokens), weights.constants.norm_eps, None
    for index, layer in enumerate(weights.layers):
        qkv = steps.norm_qkv(x, layer, eps)
        mixed = steps.attention(qkv, layer, kv.keys[index], kv.values[index], kv.rotary, rows, eps)
        x = steps.output(x, mixed, layer)
        h = steps.norm_up(x, layer, eps)
        if h.active is not None:
            active = h.active if active is None else active + h.active
        x = steps.down(x, h, layer)
    return *steps.head(x, weights), active


# --- what the pieces are made of ---------------------------------------------------------------------------------


def dtype_of(matrix: Matrix) -> torch.dtype:
    """The dtype of a matrix's products: its own in a plain format, otherwise bf16."""
    return matrix.data.dtype if matrix.format in PLAIN_BYTES else torch.bfloat16


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """`x @ matrix.T` for x (M, K): (M, N) fp32. Quantized weights are those that `Matrix.dense` gives."""
    dtype = dtype_of(matrix)
    return F.linear(x.to(dtype), matrix.dense(dtype)).float()


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x plus a bias, if there is one."""
    return x if bias is None else x + bias


def norm(x: Tensor, parts: Norm, eps: float) -> Tensor:
    """Layer norm of x (M, D) fp32, or RMSNorm where there is no offset; gains are the complete factors."""
    if parts.offset is None:
        return F.rms_norm(x, x.shape[-1:], parts.gain, eps)
    return F.layer_norm(x, x.shape[-1:], parts.gain, parts.offset, eps)


def heads_of(
    qkv: Tensor, layer: LayerWeights, rotary: tuple[Tensor, Tensor], positions: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (M, N, H), keys and values (M, K, H), fp32: normed per head where the model does, and rotated."""
    N, K = layer.num_heads, layer.num_key_value_heads
    q, k, v = qkv.view(len(qkv), N + 2 * K, -1).split((N, K, K), dim=1)
    if layer.query_norm is not None and layer.key_norm is not None:
        q, k = norm(q, Norm(layer.query_norm, None), eps), norm(k, Norm(layer.key_norm, None), eps)
    cos, sin = (table[positions][:, None] for table in rotary)
    return rotated(q, cos, sin), rotated(k, cos, sin), v


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (M, heads, H) with their first channels rotated; channel i rotates with channel i + R/2."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], dim=-1)
