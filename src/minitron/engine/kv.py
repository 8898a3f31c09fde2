"""The KV cache: keys and values of past tokens in memory that is allocated at once, divided into slots."""

from __future__ import annotations

from collections.abc import Sequence

from ..memory import available_memory
from .buffers import Buffer, zeros
from .parts import EngineWeights

GRANULE = 256
"""A cache that grows gets a multiple of so many positions, so that it does not grow with every request."""


class KeyValues:
    """Per layer, keys and values (slots, K, capacity, H) in `weights.plain_format`; a slot holds one sequence.

    The first `lengths[s]` positions of slot s are filled. Memory that is never filled is never touched.
    """

    spare = 0
    """Positions of each slot that are in memory besides the capacity."""

    def __init__(self, weights: EngineWeights, capacity: int, slots: int = 1) -> None:
        self.lengths = [0] * slots
        self.taken: set[int] = set()
        """Slots that belong to a request, see `DecodeEngine.acquire`."""
        self.keys: list[Buffer] = []
        self.values: list[Buffer] = []
        self._weights = weights
        self.format = weights.plain_format
        """Of keys and values."""
        for layer in weights.layers:
            shape = (slots, layer.num_key_value_heads, capacity + self.spare, weights.constants.head_dim)
            for parts in (self.keys, self.values):
                parts.append(self._zeros(shape))
        self._set_capacity(capacity)

    def available(self) -> int | None:
        """Bytes that a larger cache may take; None where nothing is known."""
        return available_memory()

    def _zeros(self, shape: tuple[int, ...]) -> Buffer:
        return zeros(shape, self._weights.plain_format, self._weights.embed.data)

    def _set_capacity(self, capacity: int) -> None:
        self.capacity = capacity
        self.rotary = self._weights.rotary_tables(capacity + self.spare)
        """Cosines and sines (capacity, R / 2) fp32 of the positions, and of spare ones."""

    def free_slot(self) -> int:
        """The first slot without a request and without tokens.

        Raises:
            ValueError: there is none.
        """
        for slot, length in enumerate(self.lengths):
            if length == 0 and slot not in self.taken:
                return slot
        raise ValueError(f"all {len(self.lengths)} slots are taken; release one, or open the engine with more slots")

    def release(self, slot: int) -> None:
        """Forget a slot's sequence and make the slot free."""
        self.lengths[slot] = 0
        self.taken.discard(slot)

    def truncate(self, length: int, slot: int) -> None:
        """Forget all but the first `length` tokens of a slot's sequence."""
        self.lengths[slot] = min(length, self.lengths[slot])

    def read(self, slot: int, begin: int, end: int) -> list[Buffer]:
        """Copies of a slot's keys, and then values, at positions `begin` to `end`: per layer (K, end - begin, H)."""
        copies = []
        for part in (*self.keys, *self.values):
            copies.append(self._zeros((part.shape[1], end - begin, part.shape[3])))
            copies[-1][:] = part[slot, :, begin:end]
        return copies

    def write(self, slot: int, begin: int, rows: Sequence[Buffer]) -> None:
        """Append what `read` returned to a slot's sequence, which ends at `begin`: its own tokens at its positions."""
        assert begin == self.lengths[slot], f"rows from {begin} on where {self.lengths[slot]} tokens are"
        for part, copy in zip((*self.keys, *self.values), rows, strict=True):
            part[slot, :, begin : begin + copy.shape[1]] = copy
        self.lengths[slot] = begin + rows[0].shape[1] if rows else begin

    def grow(self, capacity: int) -> bool:
        """Give each slot at least `capacity` positions; whether memory was allocated anew.

        Raises:
            ValueError: the larger cache does not fit into memory. Nothing has changed then.
        """
        if capacity <= self.capacity:
            return False
        capacity = -(-capacity // GRANULE) * GRANULE
        held = sum(part.nbytes for part in (*self.keys, *self.values))
        needed = held // max(1, self.capacity + self.spare) * (capacity + self.spare)
        left = self.available()
        if left is not None and needed - held > left:
            raise ValueError(
                f"a KV cache of {len(self.lengths)} slots with {capacity} tokens each takes {needed / 1e9:.2f} GB, and "
                f"{left / 1e9:.2f} GB of memory are free; use a shorter sequence or fewer slots"
            )
        for parts in (self.keys, self.values):
            for index, old in enumerate(parts):
                new = self._zeros((*old.shape[:2], capacity + self.spare, old.shape[3]))
                for slot, length in enumerate(self.lengths):
                    new[slot, :, :length] = old[slot, :, :length]
                parts[index] = new
        self._set_capacity(capacity)
        return True
