"""The activation of this family: the square of the rectified input."""

from __future__ import annotations

import torch
from torch import Tensor


class _SquaredReLU(torch.autograd.Function):
    """Keeps only `x` for the backward pass, where composing two operators keeps two tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x).square_()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        # From `x`, and by operators that have derivatives themselves, so that second derivatives are right.
        (x,) = ctx.saved_tensors
        kept = torch.relu(x)
        return grad * (kept + kept)


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0) ** 2`, elementwise, in the dtype of `x`. fp16 overflows above 255."""
    if torch.compiler.is_compiling():  # the compiler fuses the plain form and recomputes as it sees fit
        return torch.square(torch.relu(x))
    if torch.is_grad_enabled() and x.requires_grad:
        return _SquaredReLU.apply(x)  # type: ignore[return-value]
    return torch.relu(x).square_()  # in place: on a CPU faster than a product of the tensor with itself


class SquaredReLU(torch.nn.Module):
    """`squared_relu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """See `squared_relu`."""
        return squared_relu(x)
