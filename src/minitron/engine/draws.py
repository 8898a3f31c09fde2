"""The draws of one request: how its tokens are chosen, and the random numbers that choose them.

The numbers are those of torch's CPU generator, computed here, so that an engine can draw tokens within compiled code
and the caller's seed gives the same tokens as `sampling.choose`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from ..sampling_parameters import SamplingParameters
from .mt19937 import WORDS, Array, TwisterState, advanced, exponentials, next_block
from .sampling import best_token, kept_tokens, penalize

CLOSE = 1 - 2.0**-21
"""A score of at least this share of the best one might be the best one in the arithmetic of another program."""


class Draws:
    """How the tokens of a batch of texts are chosen, step by step.

    Each step uses random numbers for all texts of the batch, also for those that have ended, as torch does.

    Args:
        parameters: of which temperature, top-k, top-p, min-p and the repetition penalty apply.
        vocabulary: number of tokens V.
        seen: for each text the ids (T,) that the penalty counts.
        twister: the generator's state.
        close: a score of at least this share of the best one might be the best one in the arithmetic of the caller.
        steps: of which random numbers are kept at least.
    """

    def __init__(
        self,
        parameters: SamplingParameters,
        vocabulary: int,
        seen: Sequence[Array],
        twister: TwisterState,
        close: float = CLOSE,
        steps: int = 4,
    ) -> None:
        self.parameters = parameters
        self.vocabulary = vocabulary
        self.settings = np.array(
            [
                parameters.temperature,
                parameters.top_p,
                parameters.min_p,
                parameters.repetition_penalty,
                parameters.top_k,
                close,
            ]
        )
        """In the order of `engine.cpu.choice`."""
        self.texts = len(seen)
        self.per_step = 2 * vocabulary * len(seen) if parameters.temperature > 0 else 0
        """Random words that a step uses."""
        self.seen: Array | None = None
        """Which tokens the penalty counts, bool (texts, V); None without a penalty."""
        if parameters.repetition_penalty != 1:
            self.seen = np.zeros((len(seen), vocabulary), np.bool_)
            self.see(seen)
        room = -(-steps * self.per_step // WORDS) * WORDS + 2 * WORDS
        self.words = np.zeros(room, np.uint32)
        """A block of the generator's words, and those that follow it."""
        self.ready, self.used = WORDS, WORDS
        """Of the words, how many are computed, and how many are used."""
        self._scratch = np.zeros((0, vocabulary), np.float32)
        self.state = twister

    def see(self, seen: Sequence[Array]) -> None:
        """Let the penalty count these ids (T,) of each text and no others. Tokens that are chosen join them."""
        if self.seen is not None:
            self.seen[:] = False
            for row, ids in zip(self.seen, seen, strict=True):
                row[ids] = True

    def scratch(self, threads: int) -> Array:
        """Room for the weights of the tokens, (threads, V) fp32."""
        if len(self._scratch) < threads:
            self._scratch = np.zeros((threads, self.vocabulary), np.float32)
        return self._scratch

    @property
    def state(self) -> TwisterState:
        """The generator's state after the steps so far."""
        first = max(0, self.used - 1) // WORDS * WORDS
        return TwisterState(self.words[first : first + WORDS].copy(), self.used - first)

    @state.setter
    def state(self, twister: TwisterState) -> None:
        first = self.used - twister.used
        if first < 0 or first % WORDS or not np.array_equal(self.words[first : first + WORDS], twister.block):
            self.words[:WORDS] = twister.block
            self.ready, self.used = WORDS, twister.used
        self._begin = twister

    def room_for(self, steps: int) -> Array:
        """Words for so many steps, which the caller fills: what was kept is forgotten, and no words follow them."""
        needed = (steps + 1) * self.per_step + 2 * WORDS
        if len(self.words) < needed:
            self.words = np.zeros(needed, np.uint32)
        self.ready, self.used = len(self.words), 0
        return self.words

    def of_row(self, row: int) -> Draws:
        """The same draws for one text of the batch alone, which share the memory of words and seen tokens."""
        one = copy.copy(self)
        one.words = self.words[row * (self.per_step // self.texts) :]
        one.ready = len(one.words)
        one.seen = None if self.seen is None else self.seen[row : row + 1]
        return one

    def rewind(self, steps: int) -> None:
        """Go back to the state after the first `steps` steps since `state` was set."""
        self.state = advanced(self._begin, steps * self.per_step)

    def choose(self, logits: Array, rows: Sequence[int], penalized: bool = False) -> list[int]:
        """One step: the next tokens of the texts `rows` of the batch for logits (len(rows), V) float32.

        Args:
            penalized: the logits have had the penalty.

        Raises:
            NotFiniteError: the largest logit of a text is NaN or infinite.
        """
        tokens = [self.choose_one(*pair, penalized) for pair in zip(logits, rows, strict=True)]
        self.used += self.per_step
        return tokens

    def choose_one(self, logits: Array, row: int, penalized: bool = False) -> int:
        """The next token of one text for logits (V,); the step does not end with it."""
        if self.seen is not None and not penalized:
            logits = penalize(logits, np.flatnonzero(self.seen[row]), self.parameters.repetition_penalty)
        if self.parameters.temperature == 0:
            token = best_token(logits)
        else:
            ids, p = kept_tokens(logits, self.parameters)
            q = exponentials(self._words_of(row))[ids]
            order = np.argsort(ids, kind="stable")  # of equal ratios, torch takes the first in the vocabulary
            token = int(ids[order][np.argmax((p.astype(np.float32) / q)[order])])
        if self.seen is not None:
            self.seen[row, token] = True
        return token

    def _words_of(self, row: int) -> Array:
        """The words (2 V,) of one text in this step."""
        if self.used + self.per_step + WORDS > len(self.words):
            self.words[:WORDS], self.used = self.state.block, self.state.used
            self.ready = WORDS
        while self.ready < self.used + self.per_step:
            self.words[self.ready : self.ready + WORDS] = next_block(self.words[self.ready - WORDS : self.ready])
            self.ready += WORDS
        first = self.used + 2 * self.vocabulary * row
        return self.words[first : first + 2 * self.vocabulary]
