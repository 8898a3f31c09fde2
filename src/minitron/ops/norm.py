"""LayerNorm1P: layer normalization whose stored weight is the gain less one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def layer_norm_1p(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize the last dimension of `x` (..., D); gain `1 + weight`, offset `bias`, both (D,).

    The gain is formed in fp32, as Megatron and Transformer Engine trained it: `1 + w` in bf16 keeps 8 bits of the
    sum, and so loses most of a small `w`. Statistics and the affine step are fp32 as well; the result has the dtype
    of `x`. In fp32 this is bit for bit `F.layer_norm(x, ..., weight + 1, bias, eps)`.
    """
    shape = (x.shape[-1],)
    gain, offset = weight.float() + 1.0, bias.float()
    if x.dtype == torch.float64:
        return F.layer_norm(x, shape, weight.double() + 1.0, bias.double(), eps)
    # The CPU kernel takes a 16-bit input with fp32 parameters; elsewhere the input must be widened first.
    if x.dtype == torch.float32 or (x.device.type == "cpu" and not torch.compiler.is_compiling()):
        return F.layer_norm(x, shape, gain, offset, eps)
    return F.layer_norm(x.float(), shape, gain, offset, eps).to(x.dtype)
