"""Sources of drafted tokens: what followed the same words before, a smaller model, a model's own weights in int4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .base import MOST_STOPS, DecodeEngine
from .draws import Draws
from .rules import Rules
from .sampling import Array, draw_exact

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
    setup_seconds: float
    """An estimate of the time that the first draft takes to get ready, such as to copy weights."""

    def prepare(self, ids: Tensor) -> None:
        """Prefill the prompt (1, T) and do all else that takes long the first time."""

    def propose(self, ids: Tensor, count: int, draws: Draws | None = None) -> Proposal:
        """At most `count` (1 or more) tokens that may follow the text ids (1, T).

        Args:
            ids: the text.
            count: 1 or more.
            draws: by which the model will choose its tokens. A draft that draws too uses the same random numbers, so
                that where it has nearly the model's distribution it nearly always has the model's token.
        """
        ...


class Lookup:
    """Drafts what followed the last tokens where they occurred before: good for code, lists, quotes, summaries."""

    cost = 0.0
    setup_seconds = 0.0

    def __init__(self) -> None:
        self._seen = 0
        self._after: dict[tuple[int, ...], int] = {}

    def prepare(self, ids: Tensor) -> None:
        """Nothing to prepare."""

    def propose(self, ids: Tensor, count: int, draws: Draws | None = None) -> Proposal:
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
    """Drafts with another engine: a smaller model with the same vocabulary, or the same one in fewer bits.

    Args:
        open_draft: opens the draft's engine, at its first use. It may share the keys and values of `helped`, if it has
            the same layers: then it need not read the text itself, and what it writes there the model overwrites.
        helped: the model's engine.
        rules: of the request.
        cost: see `Draft`.
        setup_seconds: see `Draft`.
    """

    def __init__(
        self,
        open_draft: Callable[[], DecodeEngine],
        helped: DecodeEngine,
        rules: Rules,
        cost: float,
        setup_seconds: float = 0.0,
    ) -> None:
        self.cost = cost
        self.setup_seconds = setup_seconds
        self._open = open_draft
        self._opened: DecodeEngine | None = None
        self._helped = helped
        self._rules = rules
        self._held: list[int] = []

    @property
    def _engine(self) -> DecodeEngine:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    @property
    def shares_cache(self) -> bool:
        """Whether the draft reads the model's own keys and values."""
        return self._engine.kv is self._helped.kv

    def prepare(self, ids: Tensor) -> None:
        """Prefill the prompt, and compile or load the draft's step, so that its first measured time is typical."""
        engine = self._engine
        engine.prepare(ids.shape[1])
        if not self.shares_cache:
            self._helped.close()
            self._held = ids[0, :-1].tolist()
            engine.prefill(self._held)
            engine.close()

    def propose(self, ids: Tensor, count: int, draws: Draws | None = None) -> Proposal:
        """Draft greedily, or draw from the draft's own distribution, as the request's rules say."""
        engine = self._engine
        self._helped.close()  # the threads of two engines would compete for the cores
        tokens = ids[0].tolist()
        last = self._catch_up(tokens)
        if self._rules.plain or draws is not None:
            stops = self._rules.ends if len(self._rules.ends) <= MOST_STOPS else ()
            rows = engine.greedy(last, count, stops) if draws is None else engine.draw(last, count, draws, stops)
            proposal = Proposal([row[0] for row in rows])
        else:
            proposal = self._by_rules(ids, count, last)
        self._held = tokens + proposal.tokens[:-1]
        if self.shares_cache:
            engine.truncate(len(tokens) - 1)
        engine.close()
        return proposal

    def _catch_up(self, tokens: list[int]) -> list[int]:
        """Prefill what the draft lacks of a text but its last token, which is returned."""
        if not self.shares_cache:
            keep = _common(self._held, tokens[:-1])
            self._engine.truncate(keep)
            self._engine.prefill(tokens[keep:-1])
        return tokens[-1:]

    def _by_rules(self, ids: Tensor, count: int, last: list[int]) -> Proposal:
        """Tokens that Python code chooses."""
        length = ids.shape[1]
        work = torch.empty((1, length + count), dtype=torch.long)
        work[:, :length] = ids
        proposal = Proposal()
        for end in range(length, length + count):
            logits, past = self._engine.step(last)[-1], work[:, :end]
            if self._rules.sampling:
                proposal.distributions.append(self._rules.distribution(past, logits))
                token = draw_exact(proposal.distributions[-1])
            else:
                token = int(self._rules.next_tokens(past, logits[None])[0])
            proposal.tokens.append(token)
            work[0, end] = token
            last = [token]
        return proposal

    def close(self) -> None:
        """End the draft's threads."""
        if self._opened is not None:
            self._opened.close()


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix of two lists."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
