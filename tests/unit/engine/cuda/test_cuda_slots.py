"""A server's scheduler over the CUDA engine, whose code runs on the CPU here."""

from __future__ import annotations

import pytest
from engine_models import some_tokens, tiny_model

from minitron.assets import bundled_model
from minitron.engine.base import DecodeEngine
from minitron.engine.cpu.engine import CpuEngine
from minitron.engine.cuda.engine import CudaEngine
from minitron.engine.weights import from_model
from minitron.sampling_parameters import SamplingParameters
from minitron.serve.scheduler import Scheduler, TextSequence
from minitron.serve.served import load_model
from minitron.serve.settings import ServeSettings
from minitron.serve.text_output import TextOutput
from minitron.serve.token_choice import TokenChooser, TokenRules

CAPACITY = 80


def request(n: int, **parameters: float) -> TextSequence:
    prompt = some_tokens(3 + 9 * n, seed=n)
    chooser = TokenChooser(TokenRules(SamplingParameters(**{"temperature": 0.0, **parameters})), prompt, 96)  # type: ignore[arg-type]
    return TextSequence(prompt, chooser, TextOutput(lambda ids: " ".join(map(str, ids)), prompt), 12 + n)


def answers(engine: DecodeEngine, *requests: TextSequence, together: bool = True, chunk: int = 8) -> list[list[int]]:
    scheduler = Scheduler(engine, chunk=chunk, cache_bytes=1 << 20)
    for some in [requests] if together else [[one] for one in requests]:
        scheduler.submit(*some)
        while not all(one.ended for one in some):
            scheduler.step()
    assert all(update.error is None for _, update in scheduler.outbox)
    return [one.tokens for one in requests]


@pytest.mark.parametrize("slots", [2, 5])
def test_greedy_answers_are_those_of_the_cpu_engine(slots: int) -> None:
    held = from_model(tiny_model())
    with CpuEngine(held, CAPACITY, slots=slots) as other:
        expected = answers(other, *(request(n) for n in range(5)))
    assert answers(CudaEngine(held, CAPACITY, slots), *(request(n) for n in range(5))) == expected


def test_drawn_answers_depend_on_their_seeds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = CudaEngine(from_model(tiny_model()), CAPACITY, slots=4), []
    monkeypatch.setattr(engine, "draw_each", lambda *a, f=engine.draw_each: calls.append(1) or f(*a))

    def requests() -> list[TextSequence]:
        many = [{"temperature": 0.9}, {"temperature": 1.5, "top_k": 9}, {}, {"temperature": 0.7, "top_p": 0.8}]
        return [request(n, seed=n, **one) for n, one in enumerate(many)]

    together = answers(engine, *requests())
    assert calls
    assert answers(engine, *requests(), together=False) == together
    others = [request(n, seed=50 + n, temperature=0.9) for n in range(2)]
    assert answers(engine, *others, *requests())[2:] == together
    assert len({tuple(tokens) for tokens in answers(engine, *(request(0, temperature=2.0) for _ in range(4)))}) > 1


def test_greedy_requests_beside_drawn_ones_need_no_seed() -> None:
    engine = CudaEngine(from_model(tiny_model()), CAPACITY, slots=3)

    def requests() -> list[TextSequence]:
        return [request(0, seed=5, temperature=0.9), request(1), request(2, seed=6, temperature=0.9)]

    together = answers(engine, *requests())
    assert answers(engine, *requests(), together=False) == together


def test_requests_that_need_python_are_served_beside_others() -> None:
    held = from_model(tiny_model())
    expected = answers(CudaEngine(held, CAPACITY), request(1))
    penalized = request(2, repetition_penalty=1.3)
    assert answers(CudaEngine(held, CAPACITY, 2), request(1), penalized)[:1] == expected
    with CpuEngine(held, CAPACITY) as other:
        assert answers(other, request(2, repetition_penalty=1.3)) == [penalized.tokens]


def test_a_model_is_served_by_the_engine_of_the_settings() -> None:
    said: list[str] = []
    found = load_model("half", str(bundled_model("half")), ServeSettings(slots=2, engine="cuda"), said.append)
    assert (found.engine_name, found.reason) == ("cuda", "")
    assert "engine cuda" in said[-1]
    found = load_model("half", str(bundled_model("half")), ServeSettings(slots=1, engine="off"), said.append)
    assert (found.engine_name, found.reason) == ("transformers", 'engine is "off"')
    with pytest.raises(ValueError, match="engine is 'gpu'; it must be one of auto, cuda, off"):
        ServeSettings(engine="gpu")
