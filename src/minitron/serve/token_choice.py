"""The choice of one request's next token from its logits. Every request has a random generator and counts of its own,
so that what is beside it in a batch changes nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ..engine.sampling import kept_tokens, penalize
from ..finite import NotFiniteError
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
        neutral = not (self.presence_penalty or self.frequency_penalty or self.logit_bias)
        return neutral and self.parameters.greedy and self.top_logprobs is None


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
        seed = rules.parameters.seed
        self._generator = torch.Generator()
        self._generator.manual_seed(int.from_bytes(os.urandom(8)) >> 1 if seed is None else seed)
        self._counts: dict[int, int] = {}
        self._seen = np.zeros(vocabulary, bool)
        if rules.parameters.repetition_penalty != 1:
            self._seen[list(prompt)] = True

    def choose(self, logits: Array) -> tuple[int, TokenLogprobs | None]:
        """The next token for logits (V,) float32, and what is reported about it.

        Raises:
            NotFiniteError: the largest logit is NaN or infinite.
        """
        shaped = self._shaped(logits)
        parameters = self.rules.parameters
        if parameters.temperature == 0:
            token = int(shaped.argmax())  # the first NaN where there is one
            if not math.isfinite(shaped[token]):
                raise NotFiniteError(f"the largest logit is {shaped[token]}")
        else:
            ids, probabilities = kept_tokens(shaped, parameters)
            row = torch.zeros(len(shaped))
            row[torch.from_numpy(ids)] = torch.from_numpy(probabilities).float()
            token = int(torch.multinomial(row, 1, generator=self._generator))
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
