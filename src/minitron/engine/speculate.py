"""Speculation: something quick drafts tokens, the model looks at all of them in one step, and the text stays its own.

Greedy decoding keeps a drafted token if it is the one that the model takes; since the engine computes the same bits
for one token and for eight, the text is that of plain decoding, token for token. When sampling, a draft that is
certain (looked up) is compared with the token that is drawn as without a draft, so the same seed gives the same text;
a draft that was itself drawn, from a law q, is kept with probability min(1, p / q) and otherwise replaced by a draw
from max(p - q, 0), which leaves the law p of every token as it is (Leviathan et al. 2023, `sampling.acceptance`). p
and q are the laws after all processors: temperature, top-k, penalties and the caller's own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..decoding import Speculation
from ..sampling import Array, acceptance, draw_exact, residual
from .loop import Engine, room_for
from .rules import Rules

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

MOST_DRAFTED = 7
"""Tokens drafted at a time: with the one before them, what the engine takes in one step."""
NGRAMS = (3, 2)
"""Lengths of the last words that `Lookup` searches for, longest first."""


@dataclass
class Proposal:
    """Drafted tokens, and the law (V,) float64 that each was drawn from; no laws if they are certain."""

    tokens: list[int] = field(default_factory=list)
    laws: list[Array] = field(default_factory=list)


class Draft(Protocol):
    """What drafts."""

    cost: float
    """Seconds for a drafted token over seconds for a step of the model; a first guess."""

    def propose(self, ids: Tensor, count: int) -> Proposal:
        """At most `count` (1 or more) tokens that may follow the text ids (1, T)."""
        ...


class Lookup:
    """Drafts what followed the last words where they stood before: good for code, lists, quotes and summaries."""

    cost = 0.0

    def __init__(self) -> None:
        self._seen = 0
        self._after: dict[tuple[int, ...], int] = {}

    def propose(self, ids: Tensor, count: int) -> Proposal:
        """What stood behind the latest earlier occurrence of the last three or two tokens."""
        tokens = ids[0].tolist()
        for end in range(self._seen, len(tokens)):  # the n-grams that end before token `end`, for which it follows
            for n in NGRAMS:
                if end >= n:
                    self._after[tuple(tokens[end - n : end])] = end
        self._seen = len(tokens)
        for n in NGRAMS:
            found = self._after.get(tuple(tokens[-n:]))
            if found is not None:
                return Proposal(tokens[found : found + count])
        return Proposal()


class ModelDraft:
    """Drafts with another engine: a smaller model with the same vocabulary, or the same one in fewer bits."""

    def __init__(self, engine: Engine, helped: Engine, rules: Rules, cost: float) -> None:
        self.cost = cost
        self._engine = engine
        self._helped = helped
        self._rules = rules
        self._held: list[int] = []

    def propose(self, ids: Tensor, count: int) -> Proposal:
        """Greedily, or drawn from the draft's own law, whichever the request's rules say."""
        self._helped.close()  # two teams of threads would fight for the cores
        length = ids.shape[1]
        work = torch.empty((1, length + count), dtype=torch.long)
        work[:, :length] = ids
        tokens = ids[0].tolist()
        keep = _common(self._held, tokens[:-1])
        self._engine.truncate(keep)
        behind = max(keep, length - 1 - MOST_DRAFTED)
        self._engine.read(tokens[keep:behind])
        step, proposal = tokens[behind:], Proposal()
        for end in range(length, length + count):
            logits, past = self._engine.step(step)[-1], work[:, :end]
            if self._rules.sampling:
                proposal.laws.append(self._rules.law(past, logits))
                token = draw_exact(proposal.laws[-1])
            else:
                token = int(self._rules.next_tokens(past, logits[None])[0])
            proposal.tokens.append(token)
            work[0, end] = token
            step = [token]
        self._held = tokens + proposal.tokens[:-1]
        self._engine.close()
        return proposal


def _common(a: list[int], b: list[int]) -> int:
    """Length of what two lists have in common at their beginning."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


class DraftLength:
    """How many tokens to draft, so that tokens per second are most (Leviathan et al. 2023, 3.1).

    With k drafted tokens, each kept with probability `rate`, a step gives 1 + rate + ... + rate^k tokens and takes
    1 + k * (cost + verify) times as long as a plain one. `rate` follows what was kept lately. `cost` and `verify` are
    measured while running, but only where the text cannot depend on them: a seed must mean one text.
    """

    def __init__(self, cost: float, most: int = MOST_DRAFTED, measure: bool = True) -> None:
        self.rate, self.cost, self.verify = 0.7, cost, 0.2
        self.most = most
        self.measure = measure
        self._plain = 0.0
        """Seconds of a step with one token; 0 until known."""
        self._steps = 0

    def next(self) -> int:
        """Tokens to draft now."""
        self._steps += 1
        if self.measure and self._steps <= 2:
            return 0  # the first step compiles and warms up, the second one is the measure of the others
        if self._steps % 32 == 0:
            return self.most // 2 + 1  # so that a rate that once was low is seen to rise
        best, length, tokens, chance = 1.0, 0, 1.0, 1.0
        for k in range(1, self.most + 1):
            chance *= self.rate
            tokens += chance
            gain = tokens / (1 + k * (self.cost + self.verify))
            if gain > best:
                best, length = gain, k
        return length

    def saw(self, drafted: int, kept: int, draft_seconds: float, step_seconds: float) -> None:
        """Learn from a step."""
        # A draft that was kept whole says as many times "kept"; one that was not says "not kept" once.
        for outcome in [1.0] * kept + [0.0] * (kept < drafted):
            self.rate += 0.1 * (outcome - self.rate)
        if not self.measure or self._steps < 2:
            return
        if drafted == 0:
            self._plain = step_seconds if not self._plain else 0.8 * self._plain + 0.2 * step_seconds
        elif self._plain:
            self.verify += 0.2 * (max(0.0, step_seconds / self._plain - 1) / drafted - self.verify)
            self.cost += 0.2 * (draft_seconds / self._plain / drafted - self.cost)


def decode_with_draft(
    engine: Engine,
    draft: Draft,
    input_ids: Tensor,
    rules: Rules,
    length_rule: DraftLength,
    streamer: BaseStreamer | None,
) -> tuple[Tensor, Speculation]:
    """One prompt (1, T) and what follows it, as `loop.decode`."""
    found = Speculation()
    ids, length = room_for(input_ids, rules), input_ids.shape[1]
    engine.read(ids[0, : length - 1].tolist())
    while True:
        start = time.perf_counter()
        wanted = min(length_rule.next(), rules.limit - length - 1)
        proposal = Proposal()
        if wanted > 0:
            proposal = draft.propose(ids[:, :length], wanted)
        middle = time.perf_counter()
        logits = engine.step([int(ids[0, length - 1]), *proposal.tokens])
        end = time.perf_counter()
        begin, ended, kept = length, False, True
        while kept and not ended:
            place = length - begin
            ids[0, length], kept = _verdict(proposal, place, ids[:, :length], logits[place], rules)
            length += 1
            if streamer is not None:
                streamer.put(ids[0, length - 1 : length].clone())
            ended = bool(rules.ended(ids[:, :length])[0])
        found.steps += 1
        found.tokens += length - begin
        found.drafted += len(proposal.tokens)
        found.kept += length - begin - 1 + kept
        length_rule.saw(len(proposal.tokens), length - begin - 1 + kept, middle - start, end - middle)
        if ended:
            return ids[:, :length].clone(), found
        engine.truncate(length - 1)


def _verdict(proposal: Proposal, place: int, past: Tensor, logits: Tensor, rules: Rules) -> tuple[int, bool]:
    """The token that follows `past`, and whether it is the draft's token at `place`."""
    drafted = proposal.tokens[place] if place < len(proposal.tokens) else None
    if drafted is None or not proposal.laws:
        token = int(rules.next_tokens(past, logits[None])[0])
        return token, token == drafted
    p, q = rules.law(past, logits), proposal.laws[place]
    if float(torch.rand((), dtype=torch.float64)) < acceptance(p, q)[drafted]:
        return drafted, True
    return draw_exact(residual(p, q)), False
