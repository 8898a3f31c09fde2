"""The choice of one request's next token from its logits. Every request has a random generator and counts of its own,
so that what is beside it in a batch changes nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ..engine.draws import Draws
from ..engine.mt19937 import seeded
from ..engine.sampling import best_token, penalize
from ..finite import check_logits
from ..sampling_parameters import SamplingParameters

Array = np.ndarray[Any, Any]


class Mask(Protocol):
    """A grammar that allows some tokens at each position."""

    def allowed(self) -> Array:
        """Which tokens may come next, (V,) bool."""
        ...

    def accept(self, token: int) -> None:
        """Go on after a token."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        ...


class Picker(Protocol):
    """The part of a `DecodeEngine` that chooses tokens."""

    def pick(self, draws: Draws, logits: Array) -> Array:
        """The next tokens (B,) for logits (B, V); negative where it cannot choose."""
        ...


@dataclass(frozen=True)
class TokenRules:
    """How a request's tokens are chosen."""

    parameters: SamplingParameters
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer contains."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the answer contains it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens, by id."""
    top_logprobs: int | None = None
    """How many tokens to report at each position besides the chosen one; None reports nothing."""

    @property
    def plain(self) -> bool:
        """Whether the next token is the most probable one, whatever came before, and nothing is reported."""
        return self._neutral and self.parameters.greedy and self.top_logprobs is None

    @property
    def independent(self) -> bool:
        """Whether a token's probability is that of its logits alone, whatever came before, and nothing is reported."""
        return self._neutral and self.parameters.repetition_penalty == 1 and self.top_logprobs is None

    @property
    def _neutral(self) -> bool:
        return not (self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of the model's own distribution, before penalties and temperature, at one position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most probable tokens with their log probabilities, in falling order."""


def logprobs_of(logits: Array, token: int, top: int) -> TokenLogprobs:
    """The log probability of a token and of the `top` most probable ones, in float64, for logits (V,)."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= math.log(np.exp(wide).sum())
    best: Array = np.arange(0)
    if top:
        best = np.argpartition(-wide, min(top, len(wide) - 1))[:top]
        best = best[np.lexsort((best, -wide[best]))]
    return TokenLogprobs(token, float(wide[token]), tuple((int(index), float(wide[index])) for index in best))


class TokenChooser:
    """Chooses the tokens of one answer, one after the other."""

    def __init__(self, rules: TokenRules, prompt: Sequence[int], vocabulary: int, mask: Mask | None = None) -> None:
        """Begin an answer.

        Args:
            rules: how tokens are chosen.
            prompt: token ids before the answer, which the repetition penalty counts too.
            vocabulary: number of tokens.
            mask: a grammar that the answer must follow.
        """
        self.rules, self.mask = rules, mask
        self.plain = rules.plain and mask is None
        self._draws: Draws | None = None
        self.parameters = rules.parameters
        """Those of the rules, with a seed."""
        self.independent = mask is None and rules.independent
        """Whether an engine can draw the tokens by `parameters` alone."""
        if rules.parameters.temperature > 0:
            seed = int.from_bytes(os.urandom(4)) if rules.parameters.seed is None else rules.parameters.seed
            self.parameters = replace(rules.parameters, seed=seed)
            unpenalized = replace(rules.parameters, repetition_penalty=1.0)  # `_shaped` penalizes
            self._draws = Draws(unpenalized, vocabulary, [np.zeros(0, np.int64)], seeded(seed))
        self._counts: dict[int, int] = {}
        self._seen = np.zeros(vocabulary, bool)
        if rules.parameters.repetition_penalty != 1:
            self._seen[list(prompt)] = True

    def choose(self, logits: Array, engine: Picker) -> tuple[int, TokenLogprobs | None]:
        """The next token for logits (V,) float32, and what is reported about it.

        Args:
            logits: the model's own; they stay as they are.
            engine: draws a token in compiled code, if it has some; the token is the same without.

        Raises:
            NotFiniteError: the largest logit is NaN or infinite.
        """
        shaped = self._shaped(logits)
        token = best_token(shaped) if self._draws is None else _drawn(shaped, self._draws, engine)
        self._count(token)
        top = self.rules.top_logprobs
        return token, None if top is None else logprobs_of(logits, token, top)

    def _count(self, token: int) -> None:
        self._counts[token] = self._counts.get(token, 0) + 1
        self._seen[token] = True
        if self.mask is not None:
            self.mask.accept(token)

    def _shaped(self, logits: Array) -> Array:
        """The logits after bias, penalties and grammar; the argument stays as it is."""
        rules = self.rules
        out = logits
        if rules.logit_bias:
            out = out.copy()
            out[list(rules.logit_bias)] += np.array(list(rules.logit_bias.values()), np.float32)
        if (rules.presence_penalty or rules.frequency_penalty) and self._counts:
            out = out.copy()
            counts = np.array(list(self._counts.values()), np.float32)
            out[list(self._counts)] -= rules.presence_penalty + np.float32(rules.frequency_penalty) * counts
        if rules.parameters.repetition_penalty != 1:
            out = penalize(out, np.flatnonzero(self._seen), rules.parameters.repetition_penalty)
        if self.mask is not None:
            out = np.where(self.mask.allowed(), out, np.float32(-np.inf))
        return out


def _drawn(logits: Array, draws: Draws, engine: Picker) -> int:
    """A token drawn from logits (V,); the Python code decides where rounding in compiled code might."""
    check_logits(logits)
    token = int(engine.pick(draws, logits[None])[0])
    return token if token >= 0 else draws.choose(logits[None], [0])[0]


def prepare_choice(engine: Picker) -> None:
    """Compile the choice of a token, which would otherwise hold up the first request that draws one."""
    draws = Draws(SamplingParameters(temperature=1.0), 32, [np.zeros(0, np.int64)], seeded(0))
    engine.pick(draws, np.zeros((1, 32), np.float32))
