"""The pieces of a decode step as Triton kernels, and the one place that chooses between them and the reference."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch
from torch import Tensor

from ..matrix import Matrix
from ..parts import EngineWeights, LayerWeights
from .kernels import FORMATS, MOST_ROWS
from .steps import Activations, Rows, TorchSteps, dtype_of

OLDEST_CAPABILITY = (8, 0)
"""The oldest GPUs whose matrix units multiply bf16."""


class TritonSteps(TorchSteps):
    """The pieces of `TorchSteps` as kernels; more than `kernels.MOST_ROWS` rows at once run as torch operations.

    Sums are in another order than the reference's, and quantized weights of a single row are not rounded to bf16.
    """

    name = "triton"

    def __init__(self, weights: EngineWeights) -> None:
        """Put queries, keys and values of each layer into one matrix.

        Args:
            weights: on the device. Each layer's `q`, `k` and `v` become views of the one matrix, so that their numbers
                are in memory once.
        """
        self._qkv: dict[int, Matrix] = {}
        for layer in weights.layers:
            parts = layer.q, layer.k, layer.v
            fused = torch.cat([part.data for part in parts])
            rows = [part.shape[0] for part in parts]
            layer.q, layer.k, layer.v = (
                replace(part, data=data) for part, data in zip(parts, fused.split(rows), strict=True)
            )
            self._qkv[id(layer)] = Matrix(layer.q.format, (sum(rows), layer.q.shape[1]), fused)

    def norm_qkv(self, x: Tensor, layer: LayerWeights, eps: float) -> Tensor:
        """See `TorchSteps.norm_qkv`."""
        from .kernels.linear import linear

        if len(x) > MOST_ROWS:
            return super().norm_qkv(x, layer, eps)
        return linear(
            x, self._qkv[id(layer)], dtype_of(layer.q), norm=layer.attention_norm, eps=eps, bias=layer.qkv_bias
        )

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
        """See `TorchSteps.attention`."""
        from .kernels.attention import attend

        return attend(
            qkv,
            keys,
            values,
            rotary,
            rows.slots,
            rows.positions,
            rows.ends,
            span=rows.span,
            own_slots=rows.in_order,
            query_gain=layer.query_norm,
            key_gain=layer.key_norm,
            eps=eps,
        )

    def output(self, x: Tensor, mixed: Tensor, layer: LayerWeights) -> Tensor:
        """See `TorchSteps.output`."""
        from .kernels.linear import linear

        if len(x) > MOST_ROWS:
            return super().output(x, mixed, layer)
        return linear(mixed, layer.o, dtype_of(layer.o), bias=layer.o_bias, residual=x)

    def norm_up(self, x: Tensor, layer: LayerWeights, eps: float) -> Activations:
        """See `TorchSteps.norm_up`; of squared ReLU with the list of active neurons."""
        from .kernels.mlp import gated_silu, up_squared_relu

        if len(x) > MOST_ROWS:
            return super().norm_up(x, layer, eps)
        norm, dtype = layer.mlp_norm, dtype_of(layer.up)
        if layer.gate is not None:
            biases = {"gate_bias": layer.gate_bias, "up_bias": layer.up_bias}
            return Activations(gated_silu(x, layer.gate, layer.up, dtype, norm=norm, eps=eps, **biases))
        values, index, counts = up_squared_relu(x, layer.up, dtype, norm=norm, eps=eps, bias=layer.up_bias)
        return Activations(values, None if values.is_cuda else values.count_nonzero(dim=1), index, counts)

    def down(self, x: Tensor, h: Activations, layer: LayerWeights) -> Tensor:
        """See `TorchSteps.down`; reads the rows of active neurons only."""
        from .kernels.linear import linear
        from .kernels.mlp import down_active

        dtype = dtype_of(layer.down)
        if h.index is not None and h.counts is not None:
            return down_active(h.values, h.index, h.counts, layer.down, dtype, bias=layer.down_bias, residual=x)
        if layer.gate is None or len(x) > MOST_ROWS:
            return super().down(x, h, layer)
        return linear(h.values, layer.down, dtype, bias=layer.down_bias, residual=x)

    def head(self, x: Tensor, weights: EngineWeights) -> tuple[Tensor, Tensor]:
        """See `TorchSteps.head`."""
        from .kernels.linear import linear, normalize

        if len(x) > MOST_ROWS:
            return super().head(x, weights)
        hidden = normalize(x, weights.norm, weights.constants.norm_eps, torch.float32)
        return hidden, linear(hidden, weights.head, dtype_of(weights.head))


def why_no_kernels(weights: EngineWeights) -> str:
    """Why these weights decode without Triton kernels; empty if they decode with them.

    Args:
        weights: on the device.
    """
    device = weights.embed.data.device
    if device.type != "cuda":
        return f"the weights are on the {device.type.upper()}; kernels run on CUDA devices"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'minitron[gpu]'"
    for format in (weights.format, weights.head.format):
        if format not in FORMATS:
            return f"the format of the weights is {format!r}; kernels read {', '.join(FORMATS)}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        found, oldest = (".".join(map(str, each)) for each in (capability, OLDEST_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}; kernels need {oldest} or newer"
    return ""


def steps_for(weights: EngineWeights, kernels: bool | None = None) -> TorchSteps:
    """The pieces that these weights decode with: kernels where they run, otherwise the reference.

    Args:
        weights: on the device.
        kernels: whether to use Triton kernels; None where they run.

    Raises:
        ValueError: kernels are asked for and do not run here; says why.
    """
    reason = why_no_kernels(weights)
    if kernels and reason:
        raise ValueError(f"Triton kernels cannot be used: {reason}")
    return TorchSteps() if reason or kernels is False else TritonSteps(weights)
