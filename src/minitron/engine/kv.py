"""Keys and values of past tokens, in memory that is taken once."""

from __future__ import annotations

import torch
from torch import Tensor

from .weights import EngineWeights


class KeyValues:
    """Per layer, keys and values (slots, K, capacity, H) in the weights' dtype; a slot holds one sequence.

    Of slot s the first `lengths[s]` positions are filled. Memory that is never filled is never touched.
    """

    def __init__(self, weights: EngineWeights, capacity: int, slots: int = 1) -> None:
        self.capacity = capacity
        self.lengths = [0] * slots
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in weights.layers:
            shape = (slots, layer.num_key_value_heads, capacity, weights.constants.head_dim)
            self.keys.append(torch.zeros(shape, dtype=weights.dtype))
            self.values.append(torch.zeros(shape, dtype=weights.dtype))
