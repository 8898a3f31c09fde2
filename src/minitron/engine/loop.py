"""The loop over tokens: several texts at once, each in a slot of the engine."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import torch_generator
from .base import MOST_STOPS, DecodeEngine
from .draws import Draws
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
        engine.prefill(ids[slot, start : length - 1].tolist(), slot, more=B == 1)
    array = ids.numpy()  # the same memory
    whole = record is not None or (whole and B > 1)
    draws = None if rules.plain or whole else rules.draws(input_ids, engine)
    if (rules.plain or draws is not None) and not whole:
        return _decode_in_bursts(engine, ids, length, starts, rules, draws, streamer)
    running = list(range(B))
    ended = np.zeros(B, bool)
    logits = torch.empty(0)
    while True:
        if B == 1:
            logits = engine.step(array[0, length - 1 : length].tolist())
        elif len(running) == B:
            logits = engine.decode(array[:, length - 1].tolist(), running)
        else:  # transformers goes on with all texts; here those that have ended keep their last logits
            logits[running] = engine.decode(array[running, length - 1].tolist(), running)
        past = ids[:, :length]
        if record is not None:
            record.logits.append(logits.clone())
            record.scores.append(rules.scores(past, logits.clone()))
        chosen = rules.next_tokens(past, logits if B == 1 else logits.clone(), engine)
        array[:, length] = np.where(ended, rules.pad, chosen)
        length += 1
        if streamer is not None:
            streamer.put(ids[:, length - 1].clone())
        ended |= rules.ended(ids[:, :length])
        if ended.all():
            return ids[:, :length].clone()
        if not whole:
            running = np.flatnonzero(~ended).tolist()


def _decode_in_bursts(
    engine: DecodeEngine,
    ids: Tensor,
    length: int,
    starts: list[int],
    rules: Rules,
    draws: Draws | None,
    streamer: BaseStreamer | None,
) -> Tensor:
    """Texts whose tokens the engine chooses by itself, greedily or by `draws`, for some hundredths of a second."""
    array, limit = ids.numpy(), ids.shape[1]  # the same memory
    stops = rules.ends if len(rules.ends) <= MOST_STOPS else ()  # they only save tokens after the end
    running, ended = list(range(len(ids))), np.zeros(len(ids), bool)
    count = 1
    while True:
        start = time.perf_counter()
        if draws is not None:
            draws.see(rules.seen(ids[:, :length]))  # some texts may have been drawn too far
        with numbers_of(draws):
            fresh = _burst(engine, array[:, length - 1], running, min(count, limit - length), stops, draws)
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
            give_back(draws, used)
        if ended.all():
            return ids[:, :length].clone()
        running = np.flatnonzero(~ended).tolist()


@contextmanager
def numbers_of(draws: Draws | None) -> Iterator[None]:
    """Draw with the numbers of torch's generator, which goes on after those that were used."""
    if draws is None or not draws.per_step:
        yield
        return
    with torch_generator.held() as twister:
        draws.state = twister
        yield
        twister.block, twister.used = draws.state.block, draws.state.used


def give_back(draws: Draws | None, steps: int) -> None:
    """Set torch's generator to where it is after the first `steps` steps of the last burst."""
    if draws is None or not draws.per_step:
        return
    with torch_generator.held() as twister:
        if twister == draws.state:  # nobody has drawn numbers since
            draws.rewind(steps)
            twister.block, twister.used = draws.state.block, draws.state.used


def _burst(
    engine: DecodeEngine,
    last: Array,
    running: list[int],
    count: int,
    stops: Collection[int],
    draws: Draws | None,
) -> list[list[int]]:
    """At most `count` rows, each the next token of each running text; `last` has the last tokens of all texts.

    All rows but the last are appended to the engine's sequences.
    """
    found: list[list[list[int]]] = []
    begin = None if draws is None else draws.state
    for first in range(0, len(running), engine.most_rows):
        slots = running[first : first + engine.most_rows]
        if draws is None:
            found.append(engine.greedy(last[slots].tolist(), count, stops, slots))
        else:
            if begin is not None:
                draws.state = begin
            found.append(engine.draw(last[slots].tolist(), count, draws, stops, slots))
        if len(found[-1]) < count:  # the texts before these have more, which come again
            count = len(found[-1])
            for slot in running[:first]:
                engine.truncate(engine.kv.lengths[slot] - (len(found[0]) - count), slot)
            found = [part[:count] for part in found]
    return [[token for part in parts for token in part] for parts in zip(*found, strict=True)]
