"""The loop over tokens: several texts side by side, each in a slot of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from .kv import KeyValues
from .rules import Rules

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


class Engine(Protocol):
    """What the loops need of an engine; see `ReferenceEngine`."""

    kv: KeyValues

    @property
    def active_neurons(self) -> int:
        """MLP neurons that were not zero."""
        ...

    @property
    def seen_neurons(self) -> int:
        """All MLP neurons."""
        ...

    def read(self, tokens: list[int], slot: int = 0) -> None:
        """Append tokens."""

    def step(self, tokens: list[int], slot: int = 0) -> Tensor:
        """Append tokens; logits after each."""
        ...

    def step_each(self, tokens: list[int], slots: list[int]) -> Tensor:
        """Append a token to each of several sequences; logits after each."""
        ...

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget all but the first tokens."""

    def close(self) -> None:
        """End threads; the next call starts them again."""


@dataclass
class Record:
    """What each step saw, if the caller wants it: (B, V) fp32 a step."""

    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def room_for(input_ids: Tensor, rules: Rules) -> Tensor:
    """The prompts with room for what may follow, (B, limit)."""
    B, T = input_ids.shape
    ids = torch.full((B, max(rules.limit, T + 1)), rules.pad)
    ids[:, :T] = input_ids
    return ids


def decode(
    engine: Engine,
    input_ids: Tensor,
    starts: list[int],
    rules: Rules,
    streamer: BaseStreamer | None = None,
    record: Record | None = None,
) -> Tensor:
    """The prompts and what follows them, (B, T).

    Args:
        input_ids: (B, T), row b begins at column `starts[b]`; before it is padding.
        record: filled if given. Texts that have ended are then gone on with, as transformers does.
    """
    B, length = input_ids.shape
    ids = room_for(input_ids, rules)
    for slot, start in enumerate(starts):
        engine.read(ids[slot, start : length - 1].tolist(), slot)
    array = ids.numpy()  # the same memory
    running = list(range(B))
    ended = np.zeros(B, bool)
    logits = torch.empty(0)
    while True:
        fresh = engine.step_each(array[running, length - 1].tolist(), running)
        if len(running) == B:
            logits = fresh
        else:
            logits[running] = fresh
        past = ids[:, :length]
        if record is not None:
            record.logits.append(logits.clone())
            record.scores.append(rules.scores(past, logits))
        array[:, length] = np.where(ended, rules.pad, rules.next_tokens(past, logits))
        length += 1
        if streamer is not None:
            streamer.put(ids[:, length - 1].clone())
        ended |= rules.ended(ids[:, :length])
        if ended.all():
            return ids[:, :length].clone()
        if record is None:
            running = np.flatnonzero(~ended).tolist()
