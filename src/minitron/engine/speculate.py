"""Speculation: a cheap draft proposes tokens, the model checks all of them in one step, and the text is the model's.

Greedy decoding accepts a drafted token if the model chooses the same one; since the engine computes the same bits for
one token and for eight, the text is that of plain decoding, token for token. When sampling, a draft without
probabilities (looked up) is compared with the token that is drawn as without a draft, so the same seed gives the same
text; a draft that was drawn from a distribution q is accepted with probability min(1, p / q) and otherwise replaced by
a draw from max(p - q, 0), which leaves the distribution p of every token as it is (Leviathan et al. 2023,
`engine.sampling.acceptance`). p and q are the distributions after all processors: temperature, top-k, penalties and the
caller's own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..engine_hook import Speculation
from .base import DecodeEngine
from .loop import room_for
from .rules import Rules
from .sampling import Array, acceptance, draw_exact, residual

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

MOST_DRAFTED = 7
"""Tokens drafted at a time: with the one before them, as many as the engine takes in one step."""
VERIFY = 0.2
"""A first guess of the share of a step's time that a drafted token adds to it."""
PATIENCE = 32
"""Steps without a draft before one is tried again; doubled each time that drafting still does not pay."""
NGRAMS = (3, 2)
"""Numbers of last tokens that `Lookup` searches for, longest first."""


@dataclass
class Proposal:
    """Drafted tokens, and the distribution (V,) float64 from which each was drawn; none if they were not drawn."""

    tokens: list[int] = field(default_factory=list)
    distributions: list[Array] = field(default_factory=list)


class Draft(Protocol):
    """A source of drafted tokens."""

    cost: float
    """Seconds for a drafted token over seconds for a step of the model; a first guess."""

    def prepare(self, ids: Tensor) -> None:
        """Prefill the prompt (1, T) and do all else that takes long the first time."""

    def propose(self, ids: Tensor, count: int) -> Proposal:
        """At most `count` (1 or more) tokens that may follow the text ids (1, T)."""
        ...


class Lookup:
    """Drafts what followed the last tokens where they occurred before: good for code, lists, quotes, summaries."""

    cost = 0.0

    def __init__(self) -> None:
        self._seen = 0
        self._after: dict[tuple[int, ...], int] = {}

    def prepare(self, ids: Tensor) -> None:
        """Nothing to prepare."""

    def propose(self, ids: Tensor, count: int) -> Proposal:
        """The tokens after the latest earlier occurrence of the last three or two tokens."""
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

    def __init__(self, engine: DecodeEngine, helped: DecodeEngine, rules: Rules, cost: float) -> None:
        self.cost = cost
        self._engine = engine
        self._helped = helped
        self._rules = rules
        self._held: list[int] = []

    def prepare(self, ids: Tensor) -> None:
        """Prefill the prompt, and compile or load the draft's step, so that its first measured time is typical."""
        self._held = ids[0].tolist()
        self._engine.prefill(self._held[:-1])
        self._engine.step(self._held[-1:])
        self._engine.close()

    def propose(self, ids: Tensor, count: int) -> Proposal:
        """Draft greedily, or draw from the draft's own distribution, as the request's rules say."""
        self._helped.close()  # the threads of two engines would compete for the cores
        length = ids.shape[1]
        work = torch.empty((1, length + count), dtype=torch.long)
        work[:, :length] = ids
        tokens = ids[0].tolist()
        keep = _common(self._held, tokens[:-1])
        self._engine.truncate(keep)
        behind = max(keep, length - 1 - MOST_DRAFTED)
        self._engine.prefill(tokens[keep:behind])
        step, proposal = tokens[behind:], Proposal()
        if self._rules.plain:
            self._engine.prefill(step[:-1])
            proposal.tokens = [row[0] for row in self._engine.greedy(step[-1:], count)]
            count = 0
        for end in range(length, length + count):
            logits, past = self._engine.step(step)[-1], work[:, :end]
            if self._rules.sampling:
                proposal.distributions.append(self._rules.distribution(past, logits))
                token = draw_exact(proposal.distributions[-1])
            else:
                token = int(self._rules.next_tokens(past, logits[None])[0])
            proposal.tokens.append(token)
            work[0, end] = token
            step = [token]
        self._held = tokens + proposal.tokens[:-1]
        self._engine.close()
        return proposal


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix of two lists."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


class _Cost:
    """Time of a drafted step over that of a plain one: a linear function of the number of drafted tokens.

    It is fitted to recent measurements, and with a small weight to a guess, so that it always has a slope.
    """

    def __init__(self, cost: float, most: int) -> None:
        guess = [self._terms(k, 1 + cost * (k + 1) + VERIFY * k) for k in (1, max(2, most))]
        self._guess = [sum(terms) for terms in zip(*guess, strict=True)]
        self._seen = [0.0] * 5

    @staticmethod
    def _terms(k: int, time: float) -> tuple[float, ...]:
        return 1, k, k * k, time, k * time

    def add(self, k: int, time: float) -> None:
        """Record the time of a step with k drafted tokens."""
        pairs = zip(self._seen, self._terms(k, time), strict=True)
        self._seen = [0.9 * old + new for old, new in pairs]

    def at(self, k: int) -> float:
        """The expected time of a step with k drafted tokens."""
        n, x, xx, y, xy = (seen + 0.02 * guess for seen, guess in zip(self._seen, self._guess, strict=True))
        slope = (n * xy - x * y) / (n * xx - x * x)
        return max(0.9, (y - slope * x) / n + slope * k)  # a step with a draft is not faster than one without


class DraftLength:
    """How many tokens to draft for the most tokens per second (Leviathan et al. 2023, 3.1).

    With k drafted tokens, each accepted with probability `rate`, a step gives 1 + rate + ... + rate^k tokens. `rate`
    follows recent acceptances. So does the time of a step, but only where the text cannot depend on it, because a seed
    must give one text.
    """

    def __init__(self, cost: float, most: int = MOST_DRAFTED, measure: bool = True) -> None:
        self.rate, self.cost, self.most, self.measure = 0.85, _Cost(cost, most), most, measure
        self._plain = 0.0
        """Seconds of a step with one token; 0 until known."""
        self._steps = 0
        self._idle, self._patience = PATIENCE, PATIENCE
        """Steps without a draft since the last one, and their limit; the first draft is due at once."""
        self._again = False

    def next(self) -> int:
        """Tokens to draft now."""
        self._steps += 1
        if self.measure and self._steps <= 2:
            return 0  # the first step compiles and warms up, the second one is the reference
        if self._again or self._idle >= self._patience:  # to notice when a low rate has risen
            self._again = not self._again  # twice: the first draft has a long prefill, and its time is not typical
            self._patience *= 2 if self._again else 1
            return self.most // 2 + 1
        best, length, tokens, chance = 1.0, 0, 1.0, 1.0
        for k in range(1, self.most + 1):
            chance *= self.rate
            tokens += chance
            gain = tokens / self.cost.at(k)
            if gain > best:
                best, length = gain, k
        if length:
            self._patience = PATIENCE
            if self.measure and self._steps % 8 == 0:
                length = min(self.most, length + 1)  # to learn what one more costs
        return length

    def saw(self, drafted: int, kept: int, draft_seconds: float, step_seconds: float) -> None:
        """Learn from a step and its times."""
        # Each accepted token counts as a success; a rejection counts as one failure.
        for outcome in [1.0] * kept + [0.0] * (kept < drafted):
            self.rate += 0.1 * (outcome - self.rate)
        idle, self._idle = self._idle, 0 if drafted else self._idle + 1
        if not self.measure or self._steps < 2:
            return
        if drafted == 0:
            self._plain = step_seconds if not self._plain else 0.8 * self._plain + 0.2 * step_seconds
        elif self._plain and idle < self.most:  # after a longer pause a draft first has a prefill
            self.cost.add(drafted, (draft_seconds + step_seconds) / self._plain)


def decode_with_draft(
    engine: DecodeEngine,
    draft: Draft,
    input_ids: Tensor,
    rules: Rules,
    length_rule: DraftLength,
    streamer: BaseStreamer | None,
) -> tuple[Tensor, Speculation]:
    """One prompt (1, T) and its continuation, as `loop.decode`."""
    found = Speculation()
    ids, length = room_for(input_ids, rules), input_ids.shape[1]
    draft.prepare(input_ids)
    engine.prefill(ids[0, : length - 1].tolist())
    while True:
        start = time.perf_counter()
        count = min(length_rule.next(), rules.limit - length - 1)
        proposal = Proposal()
        if count > 0:
            proposal = draft.propose(ids[:, :length], count)
        middle = time.perf_counter()
        logits = engine.step([int(ids[0, length - 1]), *proposal.tokens])
        end = time.perf_counter()
        begin, ended, kept = length, False, True
        while kept and not ended:
            index = length - begin
            ids[0, length], kept = _verdict(proposal, index, ids[:, :length], logits[index], rules)
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


def _verdict(proposal: Proposal, index: int, past: Tensor, logits: Tensor, rules: Rules) -> tuple[int, bool]:
    """The token that follows `past`, and whether it is the drafted token at `index`."""
    drafted = proposal.tokens[index] if index < len(proposal.tokens) else None
    if drafted is None or not proposal.distributions:
        token = int(rules.next_tokens(past, logits[None])[0])
        return token, token == drafted
    p, q = rules.distribution(past, logits), proposal.distributions[index]
    if float(torch.rand((), dtype=torch.float64)) < acceptance(p, q)[drafted]:
        return drafted, True
    return draw_exact(residual(p, q)), False
