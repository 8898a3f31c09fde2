"""Speculation: a cheap draft proposes tokens, the model checks all of them in one step, and the text is the model's.

A drafted token is accepted if it is the one that the model chooses: the most probable one, or the one drawn with the
random numbers of its position. Since the engine computes the same bits for one token and for eight, the text is that of
plain decoding, token for token, greedy and for a seed. A draft that draws uses the same random numbers as the model, so
that from nearly the same distribution it nearly always draws the same token (Daliri et al. 2024, "Coupling without
communication and drafter-invariant speculative decoding").

Where processors of the caller's own change the logits, tokens are chosen in Python (`decode_with_draft`). A draft that
was drawn from a distribution q is accepted there with probability min(1, p / q) and otherwise replaced by a draw from
max(p - q, 0), which leaves the distribution p of every token as it is (Leviathan et al. 2023,
`engine.sampling.acceptance`). p and q are the distributions after all processors.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine_hook import Speculation
from .base import MAX_TOKENS, MOST_STOPS, DecodeEngine
from .draft_length import DraftLength
from .drafts import Draft, Proposal
from .draws import Draws
from .loop import BURST_SECONDS, give_back, numbers_of, room_for
from .rules import Rules
from .sampling import acceptance, draw_exact, residual

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

LOOK_AGAIN_SECONDS = 0.004
"""Time of plain decoding after a draft proposed nothing, before it is asked again."""
PROBES = (1, 3)
"""Numbers of drafted tokens whose check is timed before a draft that takes long to set up."""
UNDECIDED_STEPS = 16
"""Steps after which setting up a draft is thought of again."""


class _Text:
    """One prompt (1, T) and its continuation."""

    def __init__(self, input_ids: Tensor, rules: Rules, streamer: BaseStreamer | None) -> None:
        self._ids, self.length = room_for(input_ids, rules), input_ids.shape[1]
        self._begin = self.length
        self._rules, self._streamer = rules, streamer
        self.ended = False

    @property
    def ids(self) -> Tensor:
        """(1, T) so far; the same memory."""
        return self._ids[:, : self.length]

    @property
    def last(self) -> int:
        """The last token, which the engine has yet to append."""
        return int(self._ids[0, self.length - 1])

    @property
    def new(self) -> int:
        """Tokens after the prompt."""
        return self.length - self._begin

    @property
    def left(self) -> int:
        """Tokens that are still to come at most."""
        return self._ids.shape[1] - self.length

    def append(self, token: int) -> None:
        """Add a token, hand it to the streamer and ask whether the text ends."""
        self._ids[0, self.length] = token
        self.length += 1
        if self._streamer is not None:
            self._streamer.put(self._ids[0, self.length - 1 : self.length].clone())
        self.ended = bool(self._rules.ended(self.ids)[0])

    def extend(self, tokens: list[int]) -> int:
        """Add tokens until the text ends; how many were added."""
        for used, token in enumerate(tokens, 1):
            self.append(token)
            if self.ended:
                return used
        return len(tokens)


class Speculator:
    """Decodes one text with a draft, with tokens that the engine chooses by itself.

    Args:
        engine: the model's, with an empty sequence.
        draft: proposes tokens.
        input_ids: (1, T).
        rules: of the request; plain, or such that `Rules.draws` knows them.
        length_rule: how many tokens to draft. It keeps what it has learned of earlier texts.
        streamer: gets the tokens.
        unsaved: seconds that the draft would have saved in earlier texts, had it been set up.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        draft: Draft,
        input_ids: Tensor,
        rules: Rules,
        length_rule: DraftLength,
        streamer: BaseStreamer | None,
        unsaved: float = 0.0,
    ) -> None:
        self._engine, self._draft, self._rules, self._length_rule = engine, draft, rules, length_rule
        self.unsaved = unsaved
        """Seconds that the draft would have saved so far."""
        self._draws: Draws | None = None
        if not rules.plain:
            self._draws = rules.draws(input_ids, engine, MAX_TOKENS + 1)
        self._stops = rules.ends if len(rules.ends) <= MOST_STOPS else ()
        self._text = _Text(input_ids, rules, streamer)
        self._ready = self._probed = False
        """Whether the draft was set up, and whether the times of checks are known."""
        self._burst = 1
        self.found = Speculation()

    def run(self) -> Tensor:
        """The prompt and its continuation (1, T)."""
        text, rule = self._text, self._length_rule
        rule.begin()
        self._engine.prefill(text.ids[0, :-1].tolist())
        while not text.ended:
            count = min(rule.next(text.left), text.left - 1)
            if count > 0 and not self._ready:
                self._set_up()
                if text.ended:
                    break
            if count > 0 and self._ready:
                self._drafted(count)
            else:
                self._plain(self._pause(count))
        return text.ids.clone()

    def _pause(self, wanted: int) -> int:
        """Tokens to decode before a draft is thought of again, of which so many tokens are wanted now."""
        if wanted > 0:
            return UNDECIDED_STEPS
        return self._length_rule.pause if self._length_rule.measured else 4  # the reference

    def _plain(self, most: int) -> None:
        """Decode without a draft, at most for some hundredths of a second."""
        text, draws = self._text, self._draws
        count = max(1, min(self._burst, most, text.left))
        start = time.perf_counter()
        if draws is None:
            fresh = self._engine.greedy([text.last], count, self._stops)
        else:
            draws.see(self._rules.seen(text.ids))
            with numbers_of(draws):
                fresh = self._engine.draw([text.last], count, draws, self._stops)
        seconds = time.perf_counter() - start
        self._burst = min(2 * count, max(1, int(BURST_SECONDS * len(fresh) / seconds)))
        self._length_rule.saw(0, 0, 0.0, seconds, len(fresh))
        if not self._ready:
            self.unsaved += self._length_rule.saved(len(fresh))
        self._take([row[0] for row in fresh])
        self.found.steps += len(fresh)

    def _drafted(self, count: int) -> None:
        """Draft some tokens and check them, or decode for a moment where nothing is proposed."""
        text, draws = self._text, self._draws
        start = time.perf_counter()
        with numbers_of(draws):
            if draws is not None:
                draws.see(self._rules.seen(text.ids))
            proposed = self._draft.propose(text.ids, count, draws).tokens
            if draws is not None:
                draws.rewind(0)
                draws.see(self._rules.seen(text.ids))
            middle = time.perf_counter()
            fresh = self._engine.verify([[text.last, *proposed]], draws=(draws,)) if proposed else []
        end = time.perf_counter()
        if not proposed:
            self._plain(max(1, int(LOOK_AGAIN_SECONDS / self._length_rule.plain)) if self._length_rule.measured else 1)
            return
        kept = len(fresh[0]) - 1 + (fresh[0][-1:] == proposed[len(fresh[0]) - 1 : len(fresh[0])])
        self.found.steps += 1
        self.found.drafted += len(proposed)
        self.found.kept += kept
        self._length_rule.saw(len(proposed), kept, middle - start, end - middle)
        self._take(fresh[0])

    def _take(self, fresh: list[int]) -> None:
        used = self._text.extend(fresh)
        self.found.tokens += used
        if used < len(fresh):
            give_back(self._draws, used)

    def _set_up(self) -> None:
        """Set the draft up if that pays: in as many more tokens as there are new ones, and in earlier texts."""
        if self._pays() and not self._probed and self._draft.setup_seconds and self._length_rule.measure:
            self._probed = True
            for count in PROBES:
                if not self._text.ended and self._text.left > count + 1:
                    self._probe(count)
        if not self._text.ended and self._pays():
            self._draft.prepare(self._text.ids)
            self._ready = True

    def _pays(self) -> bool:
        new = min(self._text.left, self._text.new)
        return self.unsaved + self._length_rule.saved(new) >= self._draft.setup_seconds

    def _probe(self, count: int) -> None:
        """Time the check of so many tokens, which are hardly ever the right ones."""
        text, draws = self._text, self._draws
        start = time.perf_counter()
        with numbers_of(draws):
            if draws is not None:
                draws.see(self._rules.seen(text.ids))
            fresh = self._engine.verify([[text.last] * (count + 1)], draws=(draws,))[0]
        self._length_rule.probed(count, time.perf_counter() - start)
        self.found.steps += 1
        self._take(fresh)


def decode_with_draft(
    engine: DecodeEngine,
    draft: Draft,
    input_ids: Tensor,
    rules: Rules,
    length_rule: DraftLength,
    streamer: BaseStreamer | None,
) -> tuple[Tensor, Speculation]:
    """As `Speculator`, for rules of any kind: Python chooses each token."""
    found, text = Speculation(), _Text(input_ids, rules, streamer)
    draft.prepare(input_ids)
    engine.prefill(text.ids[0, :-1].tolist())
    while True:
        start = time.perf_counter()
        count = min(length_rule.next(), text.left - 1)
        proposal = draft.propose(text.ids, count) if count > 0 else Proposal()
        middle = time.perf_counter()
        logits = engine.step([text.last, *proposal.tokens])
        end = time.perf_counter()
        begin, kept = text.length, True
        while kept and not text.ended:
            index = text.length - begin
            token, kept = _verdict(proposal, index, text.ids, logits[index], rules)
            text.append(token)
        accepted = text.length - begin - 1 + kept
        found.steps += 1
        found.tokens += text.length - begin
        found.drafted += len(proposal.tokens)
        found.kept += accepted
        length_rule.saw(len(proposal.tokens), accepted, middle - start, end - middle)
        if text.ended:
            return text.ids.clone(), found
        engine.truncate(text.length - 1)


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
