"""Attention for training on a GPU, over packed documents: torch's `flex_attention`, which reads no block of keys that
a block of queries cannot see.

It is fast where it is compiled, so runs with `--compile` use it. torch has no backward pass of it on a CPU.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ..framework import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, sdpa_attention_forward
from .autocast import autocast_dtype, without_autocast

NAME = "minitron_flex"
_FRAMEWORK_NAME = "flex_attention"
FEWEST_CHANNELS = 16
"""Channels of a head that the compiled kernel needs."""


def register() -> None:
    """Let models have this attention, under NAME."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, flex_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[_FRAMEWORK_NAME])


def serves(model: nn.Module) -> bool:
    """Whether this attention is for a model: on a GPU, with torch's attention, without dropout in it."""
    config: Any = model.config
    return (
        next(model.parameters()).device.type == "cuda"
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and not getattr(config, "attention_dropout", 0.0)
        and (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) >= FEWEST_CHANNELS
    )


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Softmax attention in the form of transformers' attention interface.

    Args:
        module: as of transformers.
        query: (B, N, T, H); key, value: (B, K, S, H), of any floating dtypes.
        attention_mask: a `BlockMask`; with another mask, or none, torch's own attention runs.
        dropout: 0, but of torch's own attention.
        scaling: factor on the scores; H ** -0.5 if None.

    Returns:
        Output (B, T, N, H) in the dtype of autocast, or of the query without it; and None.
    """
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(  # type: ignore[return-value]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    # Rotated queries and keys may be wider than values; autocast does not know this operator.
    dtype = autocast_dtype(query) or query.dtype
    attend: Any = ALL_ATTENTION_FUNCTIONS[_FRAMEWORK_NAME]
    with without_autocast(query):
        query, key, value = (x.to(dtype) for x in (query, key, value))
        return attend(module, query, key, value, attention_mask, scaling=scaling)[0], None
