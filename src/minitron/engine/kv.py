"""Keys and values of past tokens, in memory that is taken once."""

from __future__ import annotations

import torch
from torch import Tensor

from .weights import EngineWeights


class KeyValues:
    """Per layer, keys and values (K, capacity, H) in the weights' dtype; the first `length` positions are filled."""

    def __init__(self, weights: EngineWeights, capacity: int) -> None:
        width: int = weights.config.head_dim  # type: ignore[assignment]
        self.capacity = capacity
        self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in weights.layers:
            shape = (layer.num_key_value_heads, capacity, width)
            self.keys.append(torch.zeros(shape, dtype=weights.dtype))
            self.values.append(torch.zeros(shape, dtype=weights.dtype))
