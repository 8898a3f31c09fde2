from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from served_sequences import CHUNK, alone, differing_interleavings, random_wanted, run

from minitron.assets import bundled_model
from minitron.engine.engines import open_engine
from minitron.engine.reference import ReferenceEngine
from minitron.engine.weights import from_checkpoint
from minitron.finite import NotFiniteError
from minitron.sampling_parameters import SamplingParameters
from minitron.serve import scheduler as module
from minitron.serve.errors import ApiError
from minitron.serve.scheduler import Scheduler, TextSequence
from minitron.serve.text_output import TextOutput
from minitron.serve.token_choice import TokenChooser, TokenRules

CAPACITY = 256


@pytest.fixture(scope="module")
def weights():
    return from_checkpoint(bundled_model("half"))


@pytest.fixture(scope="module")
def engine(weights):
    with open_engine(weights, CAPACITY, slots=4) as found:
        yield found


def sequence(engine, prompt, limit=8, ends=(), deadline=float("inf"), **parameters) -> TextSequence:
    rules = TokenRules(SamplingParameters(**{"temperature": 0.0, **parameters}))
    chooser = TokenChooser(rules, prompt, engine.weights.vocab_size)
    output = TextOutput(lambda ids: " ".join(map(str, ids)), prompt)
    return TextSequence(list(prompt), chooser, output, limit, frozenset(ends), deadline=deadline)


def tokens(count: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(10, 4000) for _ in range(count)]


def finished(scheduler: Scheduler, *sequences: TextSequence) -> None:
    scheduler.submit(*sequences)
    while not all(one.ended for one in sequences):
        scheduler.step()
    scheduler.outbox.clear()


def test_no_interleaving_changes_a_bit_of_an_answer(engine) -> None:
    """Requests join, leave, hit the cache and are cancelled at random; `benchmarks/serve.py` runs ten thousand."""
    differing, total, hits = differing_interleavings(engine, seed=0, count=100)
    assert differing == 0
    assert total > 300
    assert hits > 50 * CHUNK


def test_the_reference_engine_interleaves_too(weights) -> None:
    differing, total, hits = differing_interleavings(ReferenceEngine(weights, CAPACITY, 3), seed=1, count=3)
    assert (differing, total > 5, hits > 0) == (0, True, True)


def test_the_harness_notices_a_cache_of_unequal_chunks(engine, monkeypatch) -> None:
    """Where torch prefills, keys and values of another chunking have other bits: the property test would fail."""
    monkeypatch.setattr(type(engine), "short_prompt", 8)

    def whole_prompts(self) -> bool:
        if self._prefilling:
            one = self._prefilling.popleft()
            last = len(one.prompt) - 1
            if one.filled < last:
                self._append(one, last)
            self._running.append(one)
        return True

    chance, prefixes = random.Random(3), []
    wanted = [random_wanted(chance, engine.weights.vocab_size, prefixes) for _ in range(30)]
    before = [alone(engine, one) for one in wanted]
    monkeypatch.setattr(module.Scheduler, "_prefill", whole_prompts)
    after = [alone(engine, one) for one in wanted]
    assert before != after


def test_greedy_answers_are_those_of_the_engine_itself(engine) -> None:
    prompt = tokens(3 * CHUNK + 5)
    one = sequence(engine, prompt, limit=20)
    finished(Scheduler(engine, chunk=CHUNK), one)
    slot = engine.acquire(CAPACITY)
    for first in range(0, len(prompt) - 1, CHUNK):
        engine.prefill(prompt[first : min(first + CHUNK, len(prompt) - 1)], slot)
    expected = [row[0] for row in engine.greedy(prompt[-1:], 20, (), (slot,))]
    engine.release(slot)
    assert one.tokens == expected


def test_a_second_turn_is_read_from_the_cache(engine) -> None:
    scheduler = Scheduler(engine, chunk=CHUNK, cache_bytes=1 << 24)
    first = sequence(engine, tokens(5 * CHUNK + 3))
    finished(scheduler, first)
    second = sequence(engine, [*first.prompt, *first.tokens, 17, 18])
    finished(scheduler, second)
    again = sequence(engine, first.prompt)
    finished(scheduler, again)
    assert (first.cached, second.cached, again.cached) == (0, 5 * CHUNK, 5 * CHUNK)
    assert again.tokens == first.tokens


def test_an_exact_hit_leaves_the_last_token_to_decode(engine) -> None:
    scheduler = Scheduler(engine, chunk=CHUNK, cache_bytes=1 << 24)
    first, again = sequence(engine, tokens(2 * CHUNK + 1)), sequence(engine, tokens(2 * CHUNK + 1))
    finished(scheduler, first)
    finished(scheduler, again)
    assert again.cached == 2 * CHUNK == len(again.prompt) - 1
    assert again.tokens == first.tokens


def test_more_requests_than_slots_wait_in_order_and_too_many_are_refused(engine) -> None:
    scheduler = Scheduler(engine, chunk=CHUNK, most_waiting=3)
    several = [sequence(engine, tokens(4, seed), limit=3) for seed in range(7)]
    scheduler.submit(*several)
    with pytest.raises(ApiError, match="and at most 3 may") as found:
        scheduler.submit(sequence(engine, [1]))
    assert found.value.status == 429
    assert int(found.value.headers["Retry-After"]) > 0
    starts = []
    while not all(one.ended for one in several):
        scheduler.step()
        starts += [one for one in several if one.started and one not in starts]
    assert starts == several


def test_the_slots_of_cancelled_sequences_are_free_at_once(engine) -> None:
    scheduler = Scheduler(engine, chunk=CHUNK, burst_seconds=0)
    waiting = sequence(engine, tokens(6 * CHUNK), limit=100)
    running = sequence(engine, tokens(3), limit=100)
    scheduler.submit(running, waiting)
    for _ in range(3):
        scheduler.step()
    assert scheduler.num_running == 2
    for one in (running, waiting):
        scheduler.cancel(one)
    scheduler.outbox.clear()
    scheduler.step()
    assert (scheduler.num_running, scheduler.outbox) == (0, [])
    assert not engine.kv.taken
    assert engine.kv.lengths == [0] * 4


def test_a_late_request_ends_with_an_error_and_the_others_go_on(engine) -> None:
    scheduler = Scheduler(engine, chunk=CHUNK)
    late, other = sequence(engine, tokens(3), deadline=time.monotonic() - 1), sequence(engine, tokens(3), limit=5)
    scheduler.submit(late, other)
    while not other.ended:
        scheduler.step()
    errors = [update.error for one, update in scheduler.outbox if one is late]
    assert [error.status for error in errors] == [408]
    assert len(other.tokens) == 5


def test_a_long_prompt_holds_nobody_up_for_more_than_a_chunk(engine, monkeypatch) -> None:
    scheduler = Scheduler(engine, chunk=CHUNK, burst_seconds=0)
    streaming, long = sequence(engine, tokens(3), limit=60), sequence(engine, tokens(10 * CHUNK + 2, 1), limit=2)
    scheduler.submit(streaming)
    scheduler.step()
    calls: list[int] = []
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda part, slot: (calls.append(len(part)), prefill(part, slot))[1])
    scheduler.submit(long)
    before = len(streaming.tokens)
    while not long.tokens:
        scheduler.step()
    assert calls == [CHUNK] * 10 + [1]
    assert len(streaming.tokens) - before >= 10
    scheduler.cancel(streaming)
    scheduler.step()


def test_ends_and_limits(engine) -> None:
    first = sequence(engine, tokens(9), limit=6)
    finished(Scheduler(engine, chunk=CHUNK), first)
    stopping = sequence(engine, tokens(9), limit=6, ends=first.tokens[3:4])
    scheduler = Scheduler(engine, chunk=CHUNK)
    answers = run(scheduler, {stopping: 0}, {0: [stopping]})
    cut = first.tokens.index(first.tokens[3]) + 1
    assert answers[0][0] == first.tokens[:cut]
    assert answers[0][3] == "stop"
    assert answers[0][1] == "".join(f" {token}" for token in first.tokens[: cut - 1])


def test_the_log_probabilities_of_a_prompt(engine, weights) -> None:
    prompt = tokens(2 * CHUNK + 3)
    one = sequence(engine, prompt, limit=0)
    one.prompt_logprobs = 2
    finished(Scheduler(engine, chunk=CHUNK), one)
    logits = ReferenceEngine(weights, CAPACITY).step(prompt).double().log_softmax(-1)
    expected = [float(logits[at, token]) for at, token in enumerate(prompt[1:])]
    assert [found.token for found in one.reported] == prompt[1:]
    assert np.allclose([found.logprob for found in one.reported], expected, atol=0.05)  # bf16 products of torch
    assert one.tokens == []


def test_a_model_that_computes_nan_fails_one_answer_alone(engine, monkeypatch) -> None:
    scheduler = Scheduler(engine, chunk=CHUNK, burst_seconds=0)
    wrong, right = (sequence(engine, tokens(5, seed), limit=4, repetition_penalty=1.1) for seed in (1, 2))
    decode = engine.decode

    def broken(last, slots):
        logits = decode(last, slots)
        if wrong.slot in slots:
            logits[slots.index(wrong.slot)] = torch.nan
        return logits

    monkeypatch.setattr(engine, "decode", broken)
    scheduler.submit(wrong, right)
    while not (wrong.ended and right.ended):
        scheduler.step()
    assert [update.error.status for one, update in scheduler.outbox if update.error] == [500]
    assert len(right.tokens) == 4
    assert not engine.kv.taken


def test_nan_in_a_burst_fails_one_answer_alone(engine, monkeypatch) -> None:
    """The engine does not say whose logits are NaN; the others' answers are what they are alone."""
    scheduler = Scheduler(engine, chunk=CHUNK)
    wrong, right = (sequence(engine, tokens(5, seed), limit=6) for seed in (1, 2))
    expected = sequence(engine, tokens(5, 2), limit=6)
    finished(Scheduler(engine, chunk=CHUNK), expected)
    decode, greedy = engine.decode, engine.greedy

    def broken_decode(last, slots):
        logits = decode(last, slots)
        if wrong.slot in slots:
            logits[slots.index(wrong.slot)] = torch.nan
        return logits

    def broken_greedy(last, count, stops, slots):
        rows = greedy(last, count, stops, slots)
        if wrong.slot in slots and wrong.slot >= 0:
            raise NotFiniteError("the largest logit is nan")
        return rows

    monkeypatch.setattr(engine, "decode", broken_decode)
    monkeypatch.setattr(engine, "greedy", broken_greedy)
    scheduler.submit(wrong, right)
    while not (wrong.ended and right.ended):
        scheduler.step()
    assert [(one is wrong, update.error.status) for one, update in scheduler.outbox if update.error] == [(True, 500)]
    assert right.tokens == expected.tokens
