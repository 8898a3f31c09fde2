"""The loop over tokens: several texts at once, each in a slot of the engine."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .base import MAX_TOKENS, MOST_STOPS, DecodeEngine
from .rules import Rules
from .sampling import Array

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


BURST_SECONDS = 0.02
"""Time of a burst, whose tokens reach the streamer together; nobody reads faster."""


@dataclass
class Record:
    """Scores and logits of each step, (B, V) fp32, for a caller that asks for them."""

    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def room_for(input_ids: Tensor, rules: Rules) -> Tensor:
    """The prompts with room for their continuations, (B, limit)."""
    B, T = input_ids.shape
    ids = torch.full((B, max(rules.limit, T + 1)), rules.pad)
    ids[:, :T] = input_ids
    return ids


def decode(
    engine: DecodeEngine,
    input_ids: Tensor,
    starts: list[int],
    rules: Rules,
    streamer: BaseStreamer | None = None,
    record: Record | None = None,
    whole: bool = False,
) -> Tensor:
    """The prompts and their continuations, (B, T).

    Args:
        input_ids: (B, T), row b begins at column `starts[b]`; before it is padding.
        record: filled if given.
        whole: continue texts that have ended (with padding, as transformers does) until all have ended, so that the
            engine has keys and values of all positions. A `record` implies this.
    """
    B, length = input_ids.shape
    ids = room_for(input_ids, rules)
    for slot, start in enumerate(starts):
        engine.prefill(ids[slot, start : length - 1].tolist(), slot)
    array = ids.numpy()  # the same memory
    whole = record is not None or (whole and B > 1)
    if rules.plain and not whole:
        return _decode_greedily(engine, ids, length, starts, rules, streamer)
    running = list(range(B))
    ended = np.zeros(B, bool)
    logits = torch.empty(0)
    while True:
        fresh = engine.decode(array[running, length - 1].tolist(), running)
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
        if not whole:
            running = np.flatnonzero(~ended).tolist()


def _decode_greedily(
    engine: DecodeEngine, ids: Tensor, length: int, starts: list[int], rules: Rules, streamer: BaseStreamer | None
) -> Tensor:
    """Texts by arg max alone: the engine chooses tokens by itself for some hundredths of a second at a time."""
    array, limit = ids.numpy(), ids.shape[1]  # the same memory
    stops = rules.ends if len(rules.ends) <= MOST_STOPS else ()  # they only save tokens after the end
    running, ended = list(range(len(ids))), np.zeros(len(ids), bool)
    count = 1
    while True:
        start = time.perf_counter()
        fresh = _burst(engine, array[:, length - 1], running, min(count, limit - length), stops)
        count = min(2 * count, max(1, int(BURST_SECONDS * len(fresh) / (time.perf_counter() - start))))
        used = 0
        for row in fresh:  # the caller's criteria are asked after each
            array[running, length] = row
            array[ended, length] = rules.pad
            length, used = length + 1, used + 1
            if streamer is not None:
                streamer.put(ids[:, length - 1].clone())
            ended |= rules.ended(ids[:, :length])
            if ended.all():
                break
        if used < len(fresh):  # tokens after the end are dropped
            for slot in running:
                engine.truncate(length - 1 - starts[slot], slot)
        if ended.all():
            return ids[:, :length].clone()
        running = np.flatnonzero(~ended).tolist()


def _burst(
    engine: DecodeEngine, last: Array, running: list[int], count: int, stops: Collection[int]
) -> list[list[int]]:
    """At most `count` rows, each the next token of each running text; `last` has the last tokens of all texts.

    All rows but the last are appended to the engine's sequences.
    """
    found: list[list[list[int]]] = []
    for first in range(0, len(running), MAX_TOKENS):
        slots = running[first : first + MAX_TOKENS]
        found.append(engine.greedy(last[slots].tolist(), count, stops, slots))
        if len(found[-1]) < count:  # the texts before these have more, which come again
            count = len(found[-1])
            for slot in running[:first]:
                engine.truncate(engine.kv.lengths[slot] - (len(found[0]) - count), slot)
            found = [part[:count] for part in found]
    return [[token for part in parts for token in part] for parts in zip(*found, strict=True)]
