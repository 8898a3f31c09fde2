"""Rotary position embedding on the leading channels of each head."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_frequencies(rotary_dim: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """Inverse frequencies `theta ** (-2i / rotary_dim)`, fp32, shape (ceil(rotary_dim / 2),)."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float, device=device) / max(rotary_dim, 1)
    return 1.0 / (theta**exponents)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first R channels of queries and keys; the others pass unchanged.

    Args:
        q, k: (B, T, heads, H), any number of heads each.
        cos, sin: (B or 1, T, R), the two halves of the last dimension equal. Channel i turns with channel i + R/2
            (the half-split layout of NeoX and Megatron, within the rotated slice).

    Returns:
        Rotated q and k, of the same shapes.
    """
    half = cos.shape[-1] // 2
    if half == 0:
        return q, k
    cos, sin = cos[..., None, :half], sin[..., None, :half]
    return _rotate(q, cos, sin, half), _rotate(k, cos, sin, half)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)
