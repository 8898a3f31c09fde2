"""What a decode engine is: sequences in the slots of a KV cache, which requests enter and leave one by one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..sampling_parameters import SamplingParameters
from .draws import Array, Draws
from .kv import KeyValues
from .mt19937 import TwisterState, next_words, seeded
from .parts import EngineWeights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_TOKENS = 32
"""New tokens in one step of the compiled engine."""
MOST_STOPS = 64
"""Stop tokens that `DecodeEngine.greedy` can look for."""


def rows_of(groups: Sequence[list[int]], slots: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens of all groups, and for each its slot: the rows of a step that appends groups to different slots."""
    assert len(set(slots)) == len(slots) == len(groups), f"{len(groups)} groups for slots {slots}"
    tokens = [token for group in groups for token in group]
    return tokens, [slot for slot, group in zip(slots, groups, strict=True) for _ in group]


class DecodeEngine(Protocol):
    """One model's weights and a KV cache. An engine serves many requests, at the same time and one after the other.

    A request takes a slot (`acquire`), fills it with its prompt (`prefill`), grows by a token a step together with the
    requests in other slots (`decode`), and gives the slot back (`release`). What a request computes does not depend on
    the requests beside it. With a single sequence in slot 0 neither `acquire` nor `release` is needed. An engine is
    used by one thread at a time.

    Weights are those at the time when the engine was opened: an engine does not see later changes of the model.
    """

    name: str
    """As in `GenerationReport.engine`: "cpu", "cuda" or "reference"."""
    chooses: bool = False
    """Whether `greedy` and `draw` take less time than as many steps."""
    draws_each: bool = False
    """Whether there is `draw_each`."""
    drafts_batches: bool = True
    """Whether `verify` takes draws of several texts that are not equally far, see `engine.text_draws`."""
    most_rows: int = MAX_TOKENS
    """Sequences that `greedy` and `draw` take at once, and tokens that `verify` takes."""
    weights: EngineWeights
    kv: KeyValues
    hidden: Array
    """(M, D) float32: the model's last hidden states, after the last norm, at the M tokens of the last call of `step`
    or `decode`, or of the last step of `greedy` or `draw`. A row depends on its own sequence alone."""

    @property
    def device(self) -> torch.device:
        """Where it computes, and where logits are."""
        ...

    @property
    def active_neurons(self) -> int:
        """MLP neurons that were not zero, over all decoded tokens and layers."""
        ...

    @property
    def seen_neurons(self) -> int:
        """All MLP neurons, over all decoded tokens and layers."""
        ...

    def acquire(self, room: int) -> int:
        """A free slot for a sequence of at most `room` tokens, the prompt included. The cache grows if it must.

        Raises:
            ValueError: all slots are taken, or the larger cache does not fit into memory. Nothing has changed then.
        """
        slot = self.kv.free_slot()
        if room > self.kv.capacity:
            self.reserve(room)
        self.kv.taken.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Forget a slot's sequence and make the slot free."""
        self.kv.release(slot)

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget all but the first `length` tokens of a slot's sequence."""
        self.kv.truncate(length, slot)

    def reserve(self, capacity: int) -> None:
        """Let each slot hold at least `capacity` tokens. Sequences that are being decoded stay.

        Raises:
            ValueError: the larger cache does not fit into memory. Nothing has changed then.
        """

    def prepare(self, prompt: int | None = None) -> None:
        """Compile what the first calls would compile, for prompts of at most so many tokens if a number is given."""

    def prefill(self, tokens: list[int], slot: int = 0, more: bool = False) -> None:
        """Append tokens to a slot's sequence; their logits are not computed.

        Args:
            more: the next call appends another token to this sequence alone. The last tokens may wait for it, so that
                weights are read once for both; until then `kv` does not have them.
        """

    def step(self, tokens: list[int], slot: int = 0) -> Tensor:
        """Append at most MAX_TOKENS tokens to a slot's sequence; logits (len(tokens), V) after each.

        The tensor may be the engine's own memory, which the next call overwrites.
        """
        ...

    def decode(self, tokens: list[int], slots: list[int]) -> Tensor:
        """Append one token to the sequence of each slot; logits (len(tokens), V) after each."""
        import torch  # not needed to generate with compiled code

        logits, hidden = [], []
        for token, slot in zip(tokens, slots, strict=True):
            logits.append(self.step([token], slot))
            hidden.append(self.hidden)
        self.hidden = np.concatenate(hidden)
        return torch.cat(logits)

    def greedy(
        self, tokens: list[int], count: int, stops: Collection[int] = (), slots: Sequence[int] = (0,)
    ) -> list[list[int]]:
        """Append one token to the sequence of each slot and then more, each the most probable; see `CpuEngine`."""
        from ..finite import check_logits

        found: list[list[int]] = []
        while len(found) < count and not (found and set(found[-1]) & set(stops)):
            logits = self.decode(tokens, list(slots))
            check_logits(logits)
            tokens = logits.argmax(-1).tolist()
            found.append(tokens)
        return found

    def draw(
        self, tokens: list[int], count: int, draws: Draws, stops: Collection[int] = (), slots: Sequence[int] = (0,)
    ) -> list[list[int]]:
        """As `greedy`, with tokens chosen by `draws`; its batch has the text of slot s in row s."""
        found: list[list[int]] = []
        while len(found) < count and not (found and set(found[-1]) & set(stops)):
            tokens = draws.choose(self.decode(tokens, list(slots)).float().cpu().numpy(), slots)
            found.append(tokens)
        return found

    def draw_each(
        self,
        tokens: list[int],
        count: int,
        parameters: Sequence[SamplingParameters],
        stops: Collection[int] = (),
        slots: Sequence[int] = (0,),
    ) -> list[list[int]]:
        """As `draw`, with parameters and a seed for each sequence; only where `draws_each` says so."""
        raise TypeError(f"the engine {self.name!r} has one generator for all sequences")

    def verify(
        self, groups: Sequence[list[int]], slots: Sequence[int] = (0,), draws: Sequence[Draws | None] = (None,)
    ) -> list[list[int]]:
        """Append the first token of each group to the sequence of its slot, and each further one that is chosen.

        Drafted tokens are checked in this way in one step: a group is the last token of a text and the tokens that may
        follow it. The result is that of `greedy`, or of `draw`, for as many tokens.

        Args:
            groups: at most `most_rows` tokens in all; 1 or more for each text.
            slots: of the texts.
            draws: how each text's tokens are chosen, greedily if None. A text's draws have this text alone.

        Returns:
            for each text the tokens chosen after the first one: those that its group has, and then another, which is
            not appended yet.

        Raises:
            NotFiniteError: the largest logit of a token is NaN or infinite.
        """
        from .sampling import best_token

        found: list[list[int]] = []
        for group, slot, choice in zip(groups, slots, draws, strict=True):
            begin, chosen = self.kv.lengths[slot], []
            for given, row in zip([*group[1:], None], self.step(group, slot).float().numpy(), strict=True):
                chosen.append(best_token(row) if choice is None else choice.choose(row[None], [0])[0])
                if chosen[-1] != given:
                    break
            self.truncate(begin + len(chosen), slot)
            found.append(chosen)
        return found

    def draws_of(self, parameters: SamplingParameters, seen: Sequence[Array], steps: int = 4) -> Draws:
        """How this engine chooses the tokens of a batch of texts, for `draw` and `verify`.

        Args:
            parameters: of which temperature, top-k, top-p, min-p and the repetition penalty apply.
            seen: for each text the ids (T,) that the penalty counts.
            steps: of which random numbers are kept.
        """
        return Draws(parameters, self.weights.vocab_size, seen, seeded(0), steps=steps)

    def random_words(self, twister: TwisterState, out: Array) -> TwisterState:
        """Write the next random words into `out` (N,) uint32, see `mt19937.next_words`; the state after them."""
        return next_words(twister, out)

    def pick(self, draws: Draws, logits: Array) -> Array:
        """The next tokens (B,) of all texts of the draws' batch for logits (B, V) float32, without a step of the model.

        They are negative where rounding might decide, or where the engine cannot draw; the numbers of the step are then
        not used.
        """
        return np.full(len(logits), -1)

    def close(self) -> None:
        """End the engine's threads. The cache stays, and the next call starts the threads again."""
