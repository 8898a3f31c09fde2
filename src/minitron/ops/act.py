"""The activation of this family: the square of the rectified input."""

from __future__ import annotations

import torch
from torch import Tensor


class _SquaredReLU(torch.autograd.Function):
    """Keeps only `relu(x)` for the backward pass, where composing two operators keeps two tensors."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.relu(x)
        return kept * kept, kept

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor | None) -> Tensor:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return grad * (kept + kept)


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0) ** 2`, elementwise, in the dtype of `x`. fp16 overflows above 255."""
    if torch.compiler.is_compiling():  # the compiler fuses the plain form and recomputes as it sees fit
        return torch.square(torch.relu(x))
    if torch.is_grad_enabled() and x.requires_grad:
        return _SquaredReLU.apply(x)[0]  # type: ignore[index]
    kept = torch.relu(x)
    return kept.mul_(kept)


class SquaredReLU(torch.nn.Module):
    """`squared_relu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """See `squared_relu`."""
        return squared_relu(x)
