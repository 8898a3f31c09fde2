"""Sources of drafted tokens: what followed the same words before, a smaller model, a model's own weights in int4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

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

    def prepare(self, texts: Sequence[list[int]], rows: Sequence[int] = (0,)) -> None:
        """Prefill the texts of some rows of a batch, and do all else that takes long the first time."""

    def propose(
        self, texts: Sequence[list[int]], count: int, draws: Draws | None = None, rows: Sequence[int] = (0,)
    ) -> list[Proposal]:
        """For each text at most `count` tokens that may follow it; for some texts perhaps none.

        Args:
            texts: the tokens of each, without padding.
            count: 1 or more.
            draws: by which the model will choose its tokens. A draft that draws too uses the same random numbers, so
                that where it has nearly the model's distribution it nearly always has the model's token.
            rows: of the batch, in which the texts are.
        """
        ...


class Lookup:
    """Drafts what followed the last tokens where they occurred before: good for code, lists, quotes, summaries."""

    cost = 0.0
    setup_seconds = 0.0

    def __init__(self) -> None:
        self._of: dict[int, _Ngrams] = {}

    def prepare(self, texts: Sequence[list[int]], rows: Sequence[int] = (0,)) -> None:
        """Nothing to prepare."""

    def propose(
        self, texts: Sequence[list[int]], count: int, draws: Draws | None = None, rows: Sequence[int] = (0,)
    ) -> list[Proposal]:
        """For each text the tokens after the latest earlier occurrence of its last three or two tokens."""
        pairs = zip(texts, rows, strict=True)
        return [Proposal(self._of.setdefault(row, _Ngrams()).following(text, count)) for text, row in pairs]


class _Ngrams:
    """Where the n-grams of a text that grows occurred last."""

    def __init__(self) -> None:
        self._seen = 0
        self._after: dict[tuple[int, ...], int] = {}

    def following(self, tokens: list[int], count: int) -> list[int]:
        """At most `count` tokens that followed the last ones before."""
        for end in range(self._seen, len(tokens)):  # the n-grams that end before token `end`, for which it follows
            for n in NGRAMS:
                if end >= n:
                    self._after[tuple(tokens[end - n : end])] = end
        self._seen = len(tokens)
        for n in NGRAMS:
            found = self._after.get(tuple(tokens[-n:]))
            if found is not None:
                return tokens[found : found + count]
        return []


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
        self._held: dict[int, list[int]] = {}
        """For each row of the batch the tokens that the draft's cache holds."""

    @property
    def _engine(self) -> DecodeEngine:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    @property
    def shares_cache(self) -> bool:
        """Whether the draft reads the model's own keys and values."""
        return self._engine.kv is self._helped.kv

    def prepare(self, texts: Sequence[list[int]], rows: Sequence[int] = (0,)) -> None:
        """Prefill the texts, and compile or load the draft's step, so that its first measured time is typical."""
        engine = self._engine
        engine.prepare(max(map(len, texts)))
        if not self.shares_cache:
            self._helped.close()
            for text, row in zip(texts, rows, strict=True):
                self._held[row] = text[:-1]
                engine.prefill(self._held[row], row)
            engine.close()

    def propose(
        self, texts: Sequence[list[int]], count: int, draws: Draws | None = None, rows: Sequence[int] = (0,)
    ) -> list[Proposal]:
        """Draft greedily, or draw from the draft's own distribution, as the request's rules say, all texts at once."""
        engine = self._engine
        self._helped.close()  # the threads of two engines would compete for the cores
        self._catch_up(texts, rows)
        last = [text[-1] for text in texts]
        if self._rules.plain or draws is not None:
            # Of several texts, the end of one is not the end of the others.
            stops = self._rules.ends if len(rows) == 1 and len(self._rules.ends) <= MOST_STOPS else ()
            steps = (
                engine.greedy(last, count, stops, rows)
                if draws is None
                else engine.draw(last, count, draws, stops, rows)
            )
            drafted = [list(tokens) for tokens in zip(*steps, strict=True)]
            proposals = [Proposal(self._to_the_end(tokens)) for tokens in drafted]
        else:
            proposals = [self._by_rules(texts[0], count, last)]
            drafted = [proposals[0].tokens]
        for text, row, tokens in zip(texts, rows, drafted, strict=True):
            self._held[row] = text + tokens[:-1]
            if self.shares_cache:
                engine.truncate(len(text) - 1, row)
        engine.close()
        return proposals

    def _to_the_end(self, tokens: list[int]) -> list[int]:
        """Tokens up to the first one that ends a text."""
        end = next((at for at, token in enumerate(tokens, 1) if token in self._rules.ends), len(tokens))
        return tokens[:end]

    def _catch_up(self, texts: Sequence[list[int]], rows: Sequence[int]) -> None:
        """Prefill what the draft lacks of the texts but their last tokens."""
        if self.shares_cache:
            return
        engine, behind = self._engine, {}
        for text, row in zip(texts, rows, strict=True):
            keep = _common(self._held[row], text[:-1])
            engine.truncate(keep, row)
            if len(rows) > 1 and len(text) - 1 - keep == 1:
                behind[row] = text[keep]
            else:
                engine.prefill(text[keep:-1], row)
        if behind:  # all drafted tokens were accepted: one step for all such texts
            engine.decode(list(behind.values()), list(behind))

    def _by_rules(self, text: list[int], count: int, last: list[int]) -> Proposal:
        """Tokens that Python code chooses for one text."""
        length = len(text)
        work = torch.empty((1, length + count), dtype=torch.long)
        work[0, :length] = torch.tensor(text)
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
