"""Requests that enter and leave an engine while others decode: each computes what it computes alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from engine_models import some_tokens, tiny_model

from minitron.engine import kv
from minitron.engine.base import DecodeEngine
from minitron.engine.cpu.engine import CpuEngine
from minitron.engine.matrix import Format
from minitron.engine.reference import ReferenceEngine
from minitron.engine.weights import EngineWeights, from_model

SLOTS = 3
CASES = [(ReferenceEngine, "fp32"), (CpuEngine, "fp32"), (CpuEngine, "int4")]


def weights_in(format: Format) -> EngineWeights:
    return from_model(tiny_model(torch.float32 if format == "fp32" else torch.bfloat16), format)


@dataclass
class Running:
    """A request, and the logits that it has been given."""

    prompt: list[int]
    count: int
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def room(self) -> int:
        return len(self.prompt) + self.count

    @property
    def next_token(self) -> int:
        return int(self.logits[-1].argmax()) if self.logits else self.prompt[-1]


def alone(kind: type[DecodeEngine], weights: EngineWeights, request: Running) -> torch.Tensor:
    """Logits (count, V) of a request in an engine of its own."""
    engine, run = kind(weights, request.room), Running(request.prompt, request.count)  # type: ignore[call-arg]
    engine.prefill(run.prompt[:-1])
    for _ in range(run.count):
        run.logits.append(engine.step([run.next_token])[0].clone())
    engine.close()
    return torch.stack(run.logits)


def requests_of(draw: random.Random) -> list[Running]:
    """Prompts of one token, of some, of more than are prefilled in steps, and of more than the cache has at first."""
    lengths = [draw.choice((1, draw.randint(2, 12), draw.randint(33, 50), draw.randint(60, 300))) for _ in range(8)]
    return [Running(some_tokens(n, seed=draw.randint(0, 999)), draw.randint(1, 9)) for n in lengths]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kind", "format"), CASES, ids=str)
def test_requests_come_and_go_in_any_order(kind: type[DecodeEngine], format: Format, seed: int) -> None:
    draw, weights = random.Random(seed), weights_in(format)
    waiting = requests_of(draw)
    everything, running = list(waiting), dict[int, Running]()
    engine = kind(weights, 20, slots=SLOTS)  # type: ignore[call-arg]
    while waiting or running:
        if waiting and len(running) < SLOTS and draw.random() < 0.5:
            request = waiting.pop()
            slot = engine.acquire(request.room)
            assert slot not in running
            engine.prefill(request.prompt[:-1], slot)
            running[slot] = request
        elif running:
            slots = draw.sample(sorted(running), draw.randint(1, len(running)))
            logits = engine.decode([running[slot].next_token for slot in slots], slots)
            for slot, row in zip(slots, logits, strict=True):
                running[slot].logits.append(row.clone())
                if len(running[slot].logits) == running[slot].count:
                    engine.release(slot)
                    del running[slot]
    engine.close()
    assert engine.kv.lengths == [0] * SLOTS
    for request in everything:
        assert torch.equal(torch.stack(request.logits), alone(kind, weights, request))


@pytest.mark.parametrize("kind", [ReferenceEngine, CpuEngine])
def test_greedy_goes_on_in_a_cache_that_grows(kind: type[DecodeEngine]) -> None:
    weights = weights_in("fp32")
    expected = kind(weights, 400)  # type: ignore[call-arg]
    engine = kind(weights, 8)  # type: ignore[call-arg]
    for one in (expected, engine):
        one.prefill([1, 2, 3])
    texts = [[], []]
    token = [[4], [4]]
    for room in (5, 300, 400):
        engine.reserve(room)
        for text, tokens, one in zip(texts, token, (expected, engine), strict=True):
            rows = one.greedy(tokens, 2)
            text += rows
            tokens[:] = rows[-1]
    assert texts[0] == texts[1]
    for one in (expected, engine):
        one.close()


@pytest.mark.parametrize("kind", [ReferenceEngine, CpuEngine])
def test_a_request_that_does_not_fit_is_refused(kind: type[DecodeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = kind(weights_in("fp32"), 10, slots=2)  # type: ignore[call-arg]
    first, second = engine.acquire(10), engine.acquire(3)
    with pytest.raises(ValueError, match="all 2 slots are taken"):
        engine.acquire(3)
    engine.prefill([1, 2, 3], first)
    engine.release(second)
    monkeypatch.setattr(kv, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"2 slots with 5120 tokens each takes 0\.0\d GB, and 0\.00 GB of memory"):
        engine.acquire(5000)
    assert (engine.kv.capacity, engine.kv.lengths, engine.kv.taken) == (10, [3, 0], {first})
    monkeypatch.setattr(kv, "available_memory", lambda: None)  # not known
    assert engine.acquire(5000) == second
    assert engine.kv.capacity == 5120


def test_engines_say_who_they_are() -> None:
    weights = weights_in("fp32")
    assert [kind(weights, 4).name for kind in (ReferenceEngine, CpuEngine)] == ["reference", "cpu"]
    assert {kind(weights, 4).device.type for kind in (ReferenceEngine, CpuEngine)} == {"cpu"}


def test_a_slot_with_tokens_is_not_given_away() -> None:
    engine = ReferenceEngine(weights_in("fp32"), 10, slots=2)
    engine.prefill([1, 2], 0)  # without `acquire`
    assert engine.acquire(4) == 1
