"""The loop over tokens: several texts side by side, each in a slot of the engine."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from .kv import KeyValues
from .rules import Rules

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


MOST_STOPS = 64
"""Tokens that `Engine.greedy` can look for."""
BURST_SECONDS = 0.02
"""Tokens of so much time come together; nobody reads faster."""


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

    def greedy(self, token: int, count: int, stops: Collection[int] = (), slot: int = 0) -> list[int]:
        """Append a token and then more, each the most probable."""
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
    if B == 1 and record is None and rules.plain:
        return _decode_greedily(engine, ids, length, rules, streamer)
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


def _decode_greedily(engine: Engine, ids: Tensor, length: int, rules: Rules, streamer: BaseStreamer | None) -> Tensor:
    """One text by arg max alone: the engine goes on by itself for some hundredths of a second at a time."""
    count = 1
    stops = rules.ends if len(rules.ends) <= MOST_STOPS else ()  # they only save tokens behind the end
    while True:
        start = time.perf_counter()
        fresh = engine.greedy(int(ids[0, length - 1]), min(count, ids.shape[1] - length), stops)
        seconds = (time.perf_counter() - start) / len(fresh)
        count = min(2 * count, max(1, int(BURST_SECONDS / seconds)))
        for token in fresh:  # the caller's criteria are asked after each; what lies behind the end is dropped
            ids[0, length] = token
            length += 1
            if streamer is not None:
                streamer.put(ids[0, length - 1 : length].clone())
            if rules.ended(ids[:, :length])[0]:
                engine.truncate(length - 1)
                return ids[:, :length].clone()
