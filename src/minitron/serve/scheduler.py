"""Many requests over the slots of one engine: who is prefilled, who decodes, and what each gets.

A step is one chunk of one prompt and one decode step of all sequences that have been prefilled, so a long prompt holds
nobody up for longer than a chunk. Sequences join and leave between steps.

The tokens of a sequence are the same bit for bit as if it were alone. Decoding is independent of the batch (see
`DecodeEngine`), every sequence has its own random generator, and chunks of a prompt begin at fixed positions: the bits
of a matrix product depend on its number of rows. For the same reason the prefix cache keeps whole chunks only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.base import MOST_STOPS, DecodeEngine
from ..finite import NotFiniteError, check_logits
from .errors import ApiError, failed, too_busy
from .guard import Guard, Judgement
from .prefix_cache import PrefixCache
from .text_output import TextOutput
from .token_choice import TokenChooser, TokenLogprobs, logprobs_of, prepare_choice

CHUNK = 32
"""Prompt tokens in one prefill between two decode steps. The CPU engine prefills so many in one step."""
BURST_SECONDS = 0.015
"""Time for which sequences whose tokens the engine chooses decode without a look at who waits."""
RETRY_SECONDS = 5
"""What a client is told to wait where the queue is full and nothing is known about speed."""
_log = logging.getLogger("minitron.serve")


@dataclass
class Update:
    """What a sequence has got since its last update."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    """"stop", "length" or "content_filter" with the last update."""
    error: ApiError | None = None
    """Why the sequence ends without an answer."""

    def add(self, later: Update) -> None:
        """Append a later update."""
        self.text += later.text
        self.tokens += later.tokens
        self.logprobs += later.logprobs
        self.finish = later.finish


@dataclass(eq=False)
class TextSequence:
    """One text that is being written."""

    prompt: list[int]
    chooser: TokenChooser
    output: TextOutput
    limit: int
    """Largest number of new tokens; 0 with `prompt_logprobs` only."""
    ends: frozenset[int] = frozenset()
    """Tokens that end the text; they are counted, and their text does not belong to it."""
    prompt_logprobs: int | None = None
    """How many alternatives to report for each token of the prompt but the first; None reports nothing."""
    deadline: float = float("inf")
    """On the clock of `time.monotonic`."""
    tag: Any = None
    """The caller's own."""

    slot: int = -1
    filled: int = 0
    """Tokens of the prompt in the engine's cache."""
    cached: int = 0
    """Tokens of the prompt that came from the prefix cache."""
    tokens: list[int] = field(default_factory=list)
    reported: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt, if wanted."""
    judgements: dict[str, Judgement] = field(default_factory=dict)
    """What the guard says about the "prompt" and the "answer"."""
    hidden: Any = None
    """(D,) float32: the last hidden state after the last decoded token, where a guard reads it."""
    held: Update | None = None
    """The answer so far, where a guard must judge it before it is sent."""
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    """When a slot was found."""
    cancelled: bool = False
    ended: bool = False


class Scheduler:
    """Runs sequences over an engine. `submit` and `cancel` may be called from any thread, `step` from one."""

    def __init__(
        self,
        engine: DecodeEngine,
        *,
        chunk: int = CHUNK,
        cache_bytes: int = 0,
        most_waiting: int = 128,
        burst_seconds: float = BURST_SECONDS,
        guard: Guard | None = None,
    ) -> None:
        """Serve requests with the engine's slots.

        Args:
            engine: with room for the longest sequence in each slot, because bits may depend on the capacity.
            chunk: prompt tokens in one prefill.
            cache_bytes: memory of the prefix cache; 0 for an engine whose keys and values cannot be copied.
            most_waiting: requests that may wait for a slot.
            burst_seconds: time for which the engine chooses tokens by itself; 0 for single steps.
            guard: judges each prompt before its first token, and each answer at its end.
        """
        self.engine, self.chunk, self.guard = engine, chunk, guard
        self.cache = PrefixCache(chunk, cache_bytes)
        self.outbox: list[tuple[TextSequence, Update]] = []
        """Updates in the order in which they came; the caller of `step` empties it."""
        self.prefix_queries = self.prefix_hits = 0
        """Prompt tokens looked up in the prefix cache, and found there."""
        self._most_waiting, self._burst_seconds, self._burst = most_waiting, burst_seconds, 1
        self._waiting: deque[TextSequence] = deque()
        self._prefilling: deque[TextSequence] = deque()
        self._running: list[TextSequence] = []
        self._lock = threading.Lock()
        if engine.name == "cpu":
            prepare_choice(engine)

    # --- from any thread -------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._prefilling) + len(self._running)

    @property
    def num_slots(self) -> int:
        """Sequences that can run at once."""
        return len(self.engine.kv.lengths)

    def submit(self, *sequences: TextSequence) -> None:
        """Queue sequences, all or none.

        Raises:
            ApiError: the queue is full.
        """
        with self._lock:
            free = self.num_slots - self.num_running
            if len(self._waiting) + len(sequences) > self._most_waiting + max(0, free):
                raise too_busy(
                    f"{len(self._waiting)} requests are waiting, and at most {self._most_waiting} may; try again later",
                    RETRY_SECONDS,
                )
            self._waiting.extend(sequences)

    def cancel(self, sequence: TextSequence) -> None:
        """End a sequence before the next step. It gets no more updates."""
        sequence.cancelled = True

    # --- from the engine's thread ----------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do the next piece of work; whether there was any."""
        self._drop()
        self._admit()
        prefilled = self._prefill()
        decoded = self._decode()
        return prefilled or decoded

    def fail(self, error: ApiError) -> None:
        """End every sequence with an error and forget all that is cached."""
        with self._lock:
            everyone = [*self._running, *self._prefilling, *self._waiting]
            self._waiting.clear()
        for sequence in everyone:
            self._end(sequence, Update(error=error))
        self._prefilling.clear()
        self._running.clear()
        self.cache.clear()

    def _drop(self) -> None:
        """End sequences whose clients have left or whose time is over."""
        now = time.monotonic()
        late = ApiError(
            "the request took longer than the server allows", status=408, kind="server_error", code="timeout"
        )
        for sequence in [*self._running, *self._prefilling, *self._waiting]:
            if sequence.cancelled:
                self._end(sequence, None)
            elif now > sequence.deadline:
                self._end(sequence, Update(error=late))

    def _admit(self) -> None:
        while self._waiting and self.num_running < self.num_slots:
            with self._lock:
                sequence = self._waiting.popleft()
            sequence.slot = self.engine.acquire(len(sequence.prompt) + sequence.limit)
            sequence.started = time.monotonic()
            self._prefilling.append(sequence)
            if sequence.prompt_logprobs is None:
                self._reuse(sequence)

    def _reuse(self, sequence: TextSequence) -> None:
        """Copy what is known of the prompt. Its last token is decoded in any case, because its logits are needed."""
        known = sequence.prompt[:-1]
        for rows in self.cache.find(known):
            self.engine.kv.write(sequence.slot, sequence.filled, rows)
            sequence.filled += self.chunk
        sequence.cached = sequence.filled
        self.prefix_queries += len(known)
        self.prefix_hits += sequence.filled

    def _prefill(self) -> bool:
        """One chunk of the prompt that has waited longest for one."""
        if not self._prefilling:
            return False
        sequence = self._prefilling.popleft()
        last = len(sequence.prompt) - 1
        end = min((sequence.filled // self.chunk + 1) * self.chunk, last)
        try:
            if sequence.filled < end:
                self._append(sequence, end)
        except NotFiniteError as error:
            self._end(sequence, Update(error=failed(f"the model cannot answer: {error}")))
            return True
        except BaseException:
            self._prefilling.append(sequence)  # so that `fail` finds it
            raise
        (self._running if sequence.filled == last else self._prefilling).append(sequence)
        return True

    def _append(self, sequence: TextSequence, end: int) -> None:
        tokens, begin = sequence.prompt, sequence.filled
        if sequence.prompt_logprobs is None:
            self.engine.prefill(tokens[begin:end], sequence.slot)
        else:
            most = self.engine.most_rows
            for first in range(begin, end, most):
                part = tokens[first : min(first + most, end)]
                logits = self.engine.step(part, sequence.slot)
                check_logits(logits)
                for at, row in enumerate(logits.float().numpy(), first + 1):
                    sequence.reported.append(logprobs_of(row, tokens[at], sequence.prompt_logprobs))
        sequence.filled = end
        if end % self.chunk == 0 and self.cache.limit and sequence.prompt_logprobs is None:
            self.cache.insert(tokens[:end], lambda: self.engine.kv.read(sequence.slot, begin, end))

    def _decode(self) -> bool:
        if not self._running:
            return False
        if self.engine.chooses and all(one.limit and self._engine_chooses(one) for one in self._running):
            self._decode_in_bursts()
            return True
        running = list(self._running)
        last = [one.tokens[-1] if one.tokens else one.prompt[-1] for one in running]
        rows = self.engine.decode(last, [one.slot for one in running]).float().cpu().numpy()
        refused = self._see(running)
        for sequence, row in zip(running, rows, strict=True):
            if sequence in refused:
                continue
            if not sequence.limit:
                self._end(sequence, Update(finish="length"))
                continue
            try:
                token, reported = sequence.chooser.choose(row, self.engine)
            except NotFiniteError as error:
                self._end(sequence, Update(error=failed(f"the model cannot answer: {error}")))
            except Exception:
                _log.exception("the choice of a token failed")
                self._end(sequence, Update(error=failed("the next token could not be chosen")))
            else:
                self._take(sequence, [token], [] if reported is None else [reported])
        return True

    def _engine_chooses(self, sequence: TextSequence) -> bool:
        chooser = sequence.chooser
        return chooser.plain or (self.engine.draws_each and chooser.independent)

    def _decode_in_bursts(self) -> None:
        """The engine chooses tokens by itself for some hundredths of a second, in less time."""
        alone = not self._waiting and not self._prefilling
        for group in _groups(self._running, self.engine.most_rows):
            start = time.perf_counter()
            room = min(one.limit - len(one.tokens) for one in group)
            room += self.guard is not None  # one step more, so that the last token has a hidden state to be judged
            fresh = self.guard is not None and not all(one.tokens for one in group)  # whose prompt must be judged first
            count = min(self._burst, room) if alone and not fresh else 1
            stops: Collection[int] = frozenset().union(*(one.ends for one in group))
            last = [one.tokens[-1] if one.tokens else one.prompt[-1] for one in group]
            slots = [one.slot for one in group]
            lengths = [self.engine.kv.lengths[slot] for slot in slots]
            try:
                stops = stops if len(stops) <= MOST_STOPS else ()
                if all(one.chooser.plain for one in group):
                    rows = self.engine.greedy(last, count, stops, slots)
                else:
                    rows = self.engine.draw_each(last, count, [one.chooser.parameters for one in group], stops, slots)
            except NotFiniteError:  # of which sequence it does not say: the next step looks at each
                for sequence, length in zip(group, lengths, strict=True):
                    self.engine.truncate(length, sequence.slot)
                    sequence.chooser.plain = sequence.chooser.independent = False
                continue
            taken = max(time.perf_counter() - start, 1e-6)
            refused = self._see(group)
            if alone and not fresh:
                self._burst = min(2 * count, max(1, int(self._burst_seconds * len(rows) / taken)))
            for sequence, tokens in zip(group, zip(*rows, strict=True), strict=True):
                if sequence not in refused:
                    self._take(sequence, list(tokens), [])

    def _see(self, sequences: Sequence[TextSequence]) -> list[TextSequence]:
        """Keep the hidden states of the last step for the guard, and judge prompts; sequences that this has ended."""
        ended: list[TextSequence] = []
        if self.guard is None:
            return ended
        for sequence, hidden in zip(sequences, self.engine.hidden, strict=True):
            sequence.hidden = hidden
            if not sequence.tokens and not self._passes(sequence, "prompt", sequence.prompt):
                ended.append(sequence)
        return ended

    def _passes(self, sequence: TextSequence, part: str, tokens: list[int]) -> bool:
        """Whether a prompt or a whole answer may go on; if not, the sequence has been ended."""
        assert self.guard is not None
        try:
            judgement = self.guard.judge(tokens, sequence.hidden)
        except NotFiniteError as error:
            self._end(sequence, Update(error=failed(f"the guard cannot judge this: {error}")))
            return False
        sequence.judgements[part] = judgement
        if judgement.flagged and self.guard.action == "refuse":
            self._end(sequence, Update(finish="content_filter"))
            return False
        return True

    def _finish(self, sequence: TextSequence, update: Update) -> None:
        """End a sequence with its last update, after the guard has judged its answer."""
        if self.guard is not None:
            ended = bool(sequence.tokens) and sequence.tokens[-1] in sequence.ends
            answer = sequence.tokens[:-1] if ended else sequence.tokens
            if answer:
                self._append_answer(sequence, answer)
                if not self._passes(sequence, "answer", sequence.prompt + answer):
                    return
        self._end(sequence, update)

    def _append_answer(self, sequence: TextSequence, answer: list[int]) -> None:
        """Let the sequence's hidden state be that of its last token: the last chosen one has not been decoded yet, and
        a burst may have gone on after a stop string."""
        length = len(sequence.prompt) + len(answer)
        if self.engine.kv.lengths[sequence.slot] != length:
            self.engine.truncate(length - 1, sequence.slot)
            self.engine.decode(answer[-1:], [sequence.slot])
            sequence.hidden = self.engine.hidden[0]

    def _take(self, sequence: TextSequence, tokens: list[int], reported: list[TokenLogprobs]) -> None:
        """Give a sequence its next tokens, those up to its end."""
        update = Update(logprobs=reported)
        if self.guard is not None and self.guard.action == "refuse":  # nothing is sent before the whole is judged
            update = sequence.held = sequence.held or Update()
            update.logprobs += reported
        for token in tokens:
            sequence.tokens.append(token)
            update.tokens.append(token)
            mask = sequence.chooser.mask
            if token in sequence.ends:
                update.finish = "stop"
            else:
                update.text += sequence.output.push(token)
                if sequence.output.stopped or (mask is not None and mask.ended):
                    update.finish = "stop"
                elif len(sequence.tokens) >= sequence.limit:
                    update.finish = "length"
            if update.finish is not None:
                update.text += sequence.output.finish()
                update.finish = "stop" if sequence.output.stopped else update.finish
                self._finish(sequence, update)
                return
        if sequence.held is None:
            self.outbox.append((sequence, update))

    def _end(self, sequence: TextSequence, update: Update | None) -> None:
        """Free what a sequence holds. Without an update nobody is told."""
        if sequence.slot >= 0:
            self.engine.release(sequence.slot)
            sequence.slot = -1
        for queue in (self._running, self._prefilling):
            if sequence in queue:
                queue.remove(sequence)
        with self._lock:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
        sequence.ended = True
        if update is not None and not sequence.cancelled:
            self.outbox.append((sequence, update))


def _groups(sequences: Sequence[TextSequence], size: int) -> list[list[TextSequence]]:
    found = list(sequences)
    return [found[first : first + size] for first in range(0, len(found), size)]
