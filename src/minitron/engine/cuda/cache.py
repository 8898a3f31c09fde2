"""The KV cache of the CUDA engine: in the device's memory, which is allocated at once."""

from __future__ import annotations

import torch

from ..kv import KeyValues
from ..parts import EngineWeights
from .device import free_memory


class DeviceKeyValues(KeyValues):
    """A `KeyValues` on the device of the weights.

    Each slot has one position more than its capacity, to which rows write that only fill up a batch. A slot that is
    released is set to zero: attention adds a mask to all scores and multiplies masked values by zero, and neither hides
    a NaN that a sequence has left behind.
    """

    spare = 1

    def __init__(self, weights: EngineWeights, capacity: int, slots: int = 1) -> None:
        """Allocate the cache.

        Raises:
            ValueError: it does not fit into the device's memory.
        """
        self._device: torch.device = weights.embed.data.device
        heads = sum(2 * layer.num_key_value_heads for layer in weights.layers)
        each = heads * weights.constants.head_dim * weights.dtype.itemsize
        needed, left = each * (capacity + self.spare) * slots, self.available()
        if left is not None and needed > left:
            tokens = max(0, left // max(1, each * slots) - self.spare)
            raise ValueError(
                f"a KV cache of {slots} slots with {capacity} tokens each takes {needed / 1e9:.2f} GB, and "
                f"{left / 1e9:.2f} GB are free on {self._device}; {tokens} tokens each would fit"
            )
        super().__init__(weights, capacity, slots)

    def available(self) -> int | None:
        """Bytes that are free on the device."""
        return free_memory(self._device)

    def release(self, slot: int) -> None:
        """Forget a slot's sequence, in memory too, and make the slot free."""
        super().release(slot)
        for part in (*self.keys, *self.values):
            part[slot].zero_()
