from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from minitron.sampling_parameters import SamplingParameters
from minitron.serve.engine_loop import MOST_FAILURES, EngineLoop
from minitron.serve.errors import ApiError
from minitron.serve.scheduler import Scheduler, TextSequence
from minitron.serve.text_output import TextOutput
from minitron.serve.token_choice import TokenChooser, TokenRules

V = 10


class CountingEngine:
    """The next token is the last one plus one. It fails while `broken` says so."""

    name = "counting"
    chooses, draws_each, most_rows = False, False, 8

    def __init__(self) -> None:
        self.kv = SimpleNamespace(lengths=[0, 0])
        self.taken: set[int] = set()
        self.broken = 0

    def acquire(self, room: int) -> int:
        slot = min({0, 1} - self.taken)
        self.taken.add(slot)
        return slot

    def release(self, slot: int) -> None:
        self.taken.discard(slot)

    def prefill(self, tokens, slot) -> None:
        pass

    def decode(self, tokens, slots):
        if self.broken:
            self.broken -= 1
            raise RuntimeError("broken")
        return torch.nn.functional.one_hot((torch.tensor(tokens) + 1) % V, V).float()

    def close(self) -> None:
        pass


class Answers:
    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.errors: dict[int, ApiError] = {}
        self.ended = threading.Semaphore(0)

    def deliver(self, updates) -> None:
        for sequence, update in updates:
            self.tokens.setdefault(sequence.tag, []).extend(update.tokens)
            if update.error is not None:
                self.errors[sequence.tag] = update.error
            if update.error is not None or update.finish is not None:
                self.ended.release()

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.ended.acquire(timeout=20)


def sequence(tag: int, limit: int = 5) -> TextSequence:
    chooser = TokenChooser(TokenRules(SamplingParameters(temperature=0.0)), [1], V)
    return TextSequence([1, 2], chooser, TextOutput(lambda ids: "x" * len(ids), [1]), limit, tag=tag)


@pytest.fixture
def parts():
    engine, answers, deaths = CountingEngine(), Answers(), []
    scheduler = Scheduler(engine)  # type: ignore[arg-type]
    loop = EngineLoop([scheduler], answers.deliver, deaths.append)
    loop.start()
    yield engine, scheduler, loop, answers, deaths
    loop.stop()


def test_answers_from_several_threads(parts) -> None:
    _, scheduler, loop, answers, _ = parts
    threads = [threading.Thread(target=loop.submit, args=(scheduler, sequence(tag))) for tag in range(20)]
    for thread in threads:
        thread.start()
    answers.wait(20)
    assert all(answers.tokens[tag] == [3, 4, 5, 6, 7] for tag in range(20))


def test_one_failure_costs_the_answers_in_progress_and_nothing_else(parts) -> None:
    engine, scheduler, loop, answers, deaths = parts
    engine.broken = 1
    loop.submit(scheduler, sequence(1))
    answers.wait()
    assert answers.errors[1].status == 500
    loop.submit(scheduler, sequence(2))
    answers.wait()
    assert answers.tokens[2] == [3, 4, 5, 6, 7]
    assert loop.alive
    assert deaths == []


def test_an_engine_that_stays_broken_ends_the_thread_and_every_request(parts) -> None:
    engine, scheduler, loop, answers, deaths = parts
    engine.broken = MOST_FAILURES + 10
    loop.submit(scheduler, sequence(1), sequence(2), sequence(3))
    answers.wait(3)
    deadline = time.monotonic() + 20
    while loop.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loop.alive
    assert [str(error) for error in deaths] == ["broken"]
    assert {tag: error.status for tag, error in answers.errors.items()} == {1: 500, 2: 500, 3: 500}
    with pytest.raises(ApiError) as found:
        loop.submit(scheduler, sequence(4))
    assert found.value.status == 503


def test_jobs_run_between_steps_and_their_errors_come_back(parts) -> None:
    loop = parts[2]
    assert loop.call(lambda: threading.current_thread().name).result(20) == "minitron-engine"
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 // 0).result(20)
    assert loop.alive


def test_stopping_ends_what_is_unfinished_with_an_error(parts) -> None:
    _, scheduler, loop, answers, _ = parts
    loop.submit(scheduler, sequence(1, limit=10**9))
    while not answers.tokens.get(1):
        time.sleep(0.01)
    loop.stop()
    assert "shutting down" in answers.errors[1].message
