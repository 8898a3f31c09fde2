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
from .draft_length import DraftLength, DraftLengths
from .drafts import Draft, Proposal
from .loop import BURST_SECONDS
from .rules import Rules
from .sampling import acceptance, draw_exact, residual
from .text_draws import BatchDraws, OneTextDraws, TextDraws
from .texts import Texts

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

LOOK_AGAIN_SECONDS = 0.004
"""Time of plain decoding after a draft proposed nothing, before it is asked again."""
PROBES = (1, 3)
"""Numbers of drafted tokens whose check is timed before a draft that takes long to set up."""
UNDECIDED_STEPS = 16
"""Steps after which setting up a draft is thought of again."""


class Speculator:
    """Decodes texts with a draft, with tokens that the engine chooses by itself.

    All texts are drafted together and checked in one step; each keeps as many tokens as it accepts, and is then further
    than others. The number of texts that still run decides which rule of the draft's length applies.

    Args:
        engine: the model's, with an empty sequence for each text.
        draft: proposes tokens.
        texts: the prompts.
        rules: of the request; plain, or such that `Rules.draws` knows them.
        length_rules: how many tokens to draft. They keep what they have learned of earlier texts.
        most: the largest number of tokens to draft at a time.
        unsaved: seconds that the draft would have saved in earlier texts, had it been set up.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        draft: Draft,
        texts: Texts,
        rules: Rules,
        length_rules: DraftLengths,
        most: int,
        unsaved: float = 0.0,
    ) -> None:
        self._engine, self._draft, self._texts, self._length_rules, self._most = (
            engine,
            draft,
            texts,
            length_rules,
            most,
        )
        self.unsaved = unsaved
        """Seconds that the draft would have saved so far."""
        self._draws = TextDraws()
        draws = None if rules.plain else rules.draws(texts.ids, engine, MAX_TOKENS + 1)
        if draws is not None:
            alone = len(texts.running) == 1
            self._draws = OneTextDraws(draws, texts) if alone else BatchDraws(draws, texts, engine, most + 1)
        self._stops = rules.ends if len(rules.ends) <= MOST_STOPS else ()
        self._ready = self._probed = False
        """Whether the draft was set up, and whether the times of checks are known."""
        self._burst = 1
        self._worth = 0.0
        """Seconds that plain decoding is expected to take for what the last step has completed."""
        self.found = Speculation()

    @property
    def _length_rule(self) -> DraftLength:
        running = len(self._texts.running)
        return self._length_rules.of(running, min(self._most, self._engine.most_rows // running - 1))

    def run(self) -> Tensor:
        """The prompts and their continuations (B, T)."""
        texts = self._texts
        self._length_rules.begin()
        for row in texts.running:
            self._engine.prefill(texts.tokens(row)[:-1], row)
        while not texts.ended:
            left = max(map(texts.left, texts.running))
            count = min(self._length_rule.next(left), left - 1)
            if count > 0 and not self._ready:
                self._set_up()
                if texts.ended:
                    break
            if count > 0 and self._ready:
                self._drafted(count)
            else:
                self._plain(self._pause(count))
        return texts.ids.clone()

    def _pause(self, wanted: int) -> int:
        """Tokens to decode before a draft is thought of again, of which so many tokens are wanted now."""
        if wanted > 0:
            return UNDECIDED_STEPS
        return self._length_rule.pause if self._length_rule.measured else 4  # the reference

    def _plain(self, most: int) -> None:
        """Decode without a draft, at most for some hundredths of a second."""
        texts, rule = self._texts, self._length_rule
        rows = list(texts.running)
        count = self._draws.most_steps(max(1, min(self._burst, most, *map(texts.left, rows))))
        start = time.perf_counter()
        with self._draws.of(rows, count) as (draws, _):
            last = [texts.last(row) for row in rows]
            if draws is None:
                fresh = self._engine.greedy(last, count, self._stops, rows)
            else:
                fresh = self._engine.draw(last, count, draws, self._stops, rows)
        seconds = time.perf_counter() - start
        self._burst = min(2 * count, max(1, int(BURST_SECONDS * len(fresh) / seconds)))
        self._take([[row[at] for row in fresh] for at in range(len(rows))], rows, len(fresh))
        rule.saw_texts([(0, 0)] * len(rows), 0.0, seconds, len(fresh), self._worth)
        if not self._ready:
            self.unsaved += rule.saved(len(fresh))

    def _drafted(self, count: int) -> None:
        """Draft some tokens and check them, or decode for a moment where nothing is proposed."""
        texts, rule = self._texts, self._length_rule
        rows = list(texts.running)
        asked = [row for row in rows if texts.left(row) > count]
        start = time.perf_counter()
        with self._draws.of(rows, count + 1) as (draws, each):
            known = [texts.tokens(row) for row in asked]
            proposals = zip(asked, self._draft.propose(known, count, draws, asked), strict=True)
            proposed = {row: proposal.tokens for row, proposal in proposals}
            self._draws.again()
            groups = [[texts.last(row), *proposed.get(row, [])] for row in rows]
            middle = time.perf_counter()
            fresh = self._engine.verify(groups, rows, each) if any(proposed.values()) else []
        end = time.perf_counter()
        if not fresh:
            self._plain(max(1, int(LOOK_AGAIN_SECONDS / rule.plain)) if rule.measured else 1)
            return
        drafts = []
        for group, chosen in zip(groups, fresh, strict=True):
            at = len(chosen)
            drafts.append((len(group) - 1, at - 1 + (chosen[-1:] == group[at : at + 1])))
        self.found.drafted += sum(drafted for drafted, _ in drafts)
        self.found.kept += sum(kept for _, kept in drafts)
        self._take(fresh, rows, 1)
        rule.saw_texts(drafts, middle - start, end - middle, 1, self._worth)

    def _take(self, fresh: list[list[int]], rows: list[int], steps: int) -> None:
        """Add new tokens to texts, which took so many steps."""
        for row, tokens in zip(rows, fresh, strict=True):
            self._texts.extend(row, tokens)
        counts = self._texts.complete()
        self._worth = self._length_rules.plain_seconds(counts)
        self.found.tokens += sum(counts)
        self.found.steps += steps * len(rows)
        if self._texts.ended:
            self._draws.end(len(fresh[0]))

    def _set_up(self) -> None:
        """Set the draft up if that pays: in as many more tokens as there are new ones, and in earlier texts."""
        texts = self._texts
        if not self._probed and self._draft.setup_seconds and self._length_rule.measure:
            for count in PROBES:
                room = not texts.ended and min(map(texts.left, texts.running)) > count + 1
                if room and count <= self._length_rule.most:
                    self._probe(count)
        if not texts.ended and self._pays():
            self._draft.prepare([texts.tokens(row) for row in texts.running], texts.running)
            self._ready = True

    def _pays(self) -> bool:
        texts = self._texts
        new = max(min(texts.left(row), texts.new(row)) for row in texts.running)
        return self.unsaved + self._length_rule.saved(new) >= self._draft.setup_seconds

    def _probe(self, count: int) -> None:
        """Time the check of so many tokens, which are hardly ever the right ones.

        The first check of all takes up to twice as long as later ones, so it does not count.
        """
        texts, rule = self._texts, self._length_rule
        rows = list(texts.running)
        for counts in (False, True) if rule.untried and not self._probed else (True,):
            self._probed = True
            start = time.perf_counter()
            with self._draws.of(rows, count + 1) as (_, each):
                fresh = self._engine.verify([[texts.last(row)] * (count + 1) for row in rows], rows, each)
            rule.probed(count, time.perf_counter() - start, counts)
            self._take(fresh, rows, 1)
            if texts.ended or list(texts.running) != rows:
                return


def decode_with_draft(
    engine: DecodeEngine,
    draft: Draft,
    input_ids: Tensor,
    rules: Rules,
    length_rule: DraftLength,
    streamer: BaseStreamer | None,
) -> tuple[Tensor, Speculation]:
    """As `Speculator`, for rules of any kind: Python chooses each token."""
    found, texts = Speculation(), Texts(input_ids, [0], rules, streamer)
    draft.prepare([texts.tokens(0)])
    engine.prefill(texts.tokens(0)[:-1])
    while True:
        start = time.perf_counter()
        count = min(length_rule.next(), texts.left(0) - 1)
        proposal = draft.propose([texts.tokens(0)], count)[0] if count > 0 else Proposal()
        middle = time.perf_counter()
        logits = engine.step([texts.last(0), *proposal.tokens])
        end = time.perf_counter()
        begin, kept = texts.columns, True
        while kept and not texts.ended:
            index = texts.columns - begin
            token, kept = _verdict(proposal, index, texts.ids, logits[index], rules)
            texts.extend(0, [token])
            texts.complete()
        new = texts.columns - begin
        found.steps += 1
        found.tokens += new
        found.drafted += len(proposal.tokens)
        found.kept += new - 1 + kept
        length_rule.saw(len(proposal.tokens), new - 1 + kept, middle - start, end - middle)
        if texts.ended:
            return texts.ids.clone(), found
        engine.truncate(texts.ids.shape[1] - 1)


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
