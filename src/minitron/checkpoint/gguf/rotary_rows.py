"""The order of rows in queries and keys: Hugging Face rotates channel i with i + H/2, llama.cpp's Llama 2i with 2i + 1.

llama.cpp's converter stores the rows of a Llama's `q_proj` and `k_proj` in the order that its RoPE wants. Its other
architectures rotate as Hugging Face does, and keep the order.
"""

from __future__ import annotations

import re

import torch

from ..tensors import LazyTensor

INTERLEAVED = ("llama",)
"""Architectures of llama.cpp whose RoPE rotates neighbouring channels."""
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.(?:weight|bias)")


def is_rotated(name: str) -> bool:
    """Whether rows of the parameter of that Hugging Face name are channels of queries or keys."""
    return _ROTATED.fullmatch(name) is not None


def interleaved(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    """Rows in Hugging Face's order as rows in the order of llama.cpp's Llama."""
    return _by_heads(tensor, torch.arange(head_dim).view(2, -1).T.flatten())


def half_split(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    """The inverse of `interleaved`."""
    return _by_heads(tensor, torch.arange(head_dim).view(-1, 2).T.flatten())


def _by_heads(tensor: LazyTensor, order: torch.Tensor) -> LazyTensor:
    """The tensor with the rows of each head in another order; whole heads are read."""
    head_dim = len(order)

    def rows(start: int, stop: int) -> torch.Tensor:
        if start >= stop:
            return tensor.rows(start, stop)
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        heads = tensor.rows(first, last).unflatten(0, (-1, head_dim))
        return heads[:, order].flatten(0, 1)[start - first : stop - first].contiguous()

    return LazyTensor(tensor.shape, tensor.dtype, rows)
