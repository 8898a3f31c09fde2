"""The CUDA engine on the CPU, where nothing is captured: against transformers, the CPU engine and the exact logits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from engine_models import VARIANTS, logits_of, some_tokens, tiny_model, unpacked
from family_samples import KINDS, kind_config, small_model

from minitron.engine.cpu.engine import CpuEngine
from minitron.engine.cuda.engine import CudaEngine
from minitron.engine.cuda.graphs import HISTORY
from minitron.engine.cuda.steps import TorchSteps
from minitron.engine.matrix import Format
from minitron.engine.reference import ReferenceEngine
from minitron.engine.weights import EngineWeights, from_model
from minitron.finite import NotFiniteError


def weights(dtype: torch.dtype = torch.float32, **overrides: Any) -> EngineWeights:
    return from_model(tiny_model(dtype, **overrides))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_after_a_prefill_are_the_exact_ones(kind: str) -> None:
    model, tokens = small_model(kind_config(kind)), some_tokens(24)
    with torch.inference_mode():
        exact = model.double()(torch.tensor([tokens])).logits[0, 9:]
    found = logits_of(CudaEngine(from_model(model.float()), 24), tokens, 9, 3)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_exact_for_every_shape(variant: str) -> None:
    model, tokens = tiny_model(**VARIANTS[variant]), some_tokens(24)
    with torch.inference_mode():
        exact = model.double()(torch.tensor([tokens])).logits[0, 13:]
    found = logits_of(CudaEngine(from_model(model.float()), 24), tokens, 13, 8)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("format", ["int8", "int4", "bf16"])
def test_logits_of_other_formats_are_those_of_the_same_numbers(format: Format) -> None:
    held, tokens = from_model(tiny_model(torch.bfloat16, intermediate_size=131), format), some_tokens(24)
    expected = logits_of(ReferenceEngine(unpacked(held), 24), tokens, 8, 8)
    found = logits_of(CudaEngine(held, 24), tokens, 8, 3)
    assert (found - expected).square().mean().sqrt() <= 0.03 * expected.square().mean().sqrt()


def test_half_precision_weights_decode() -> None:
    model, tokens = tiny_model(), some_tokens(24)
    expected = logits_of(CudaEngine(from_model(model), 24), tokens, 8, 8)
    found = logits_of(CudaEngine(from_model(model.half()), 24), tokens, 8, 8)
    assert (found - expected).square().mean().sqrt() <= 0.01 * expected.square().mean().sqrt()


def test_a_prompt_of_several_chunks_is_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    held, tokens = weights(), some_tokens(40)
    expected = logits_of(CudaEngine(held, 40), tokens, 30, 1)
    monkeypatch.setattr("minitron.engine.cuda.prefill.CHUNK", 7)
    torch.testing.assert_close(logits_of(CudaEngine(held, 40), tokens, 30, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_requests_come_and_go_in_any_order(seed: int) -> None:
    draw, held = random.Random(seed), weights()
    prompts = [some_tokens(draw.choice((1, 4, 50, 270)), seed=n) for n in range(6)]
    counts = [draw.randint(1, 9) for _ in prompts]
    engine, waiting, found = CudaEngine(held, 20, slots=3), list(range(6)), {n: [] for n in range(6)}
    running: dict[int, int] = {}
    while waiting or running:
        if waiting and len(running) < 3 and draw.random() < 0.5:
            n = waiting.pop()
            slot = engine.acquire(len(prompts[n]) + counts[n])
            engine.prefill(prompts[n][:-1], slot)
            running[slot] = n
        elif running:
            slots = draw.sample(sorted(running), draw.randint(1, len(running)))
            last = [(found[running[s]] or prompts[running[s]])[-1] for s in slots]
            for slot, row in zip(slots, engine.decode(last, slots), strict=True):
                found[running[slot]].append(int(row.argmax()))
                if len(found[running[slot]]) == counts[running[slot]]:
                    engine.release(slot)
                    del running[slot]
    assert engine.kv.lengths == [0] * 3
    for n, prompt in enumerate(prompts):
        with CpuEngine(held, len(prompt) + counts[n]) as alone:
            alone.prefill(prompt[:-1])
            assert found[n] == [row[0] for row in alone.greedy(prompt[-1:], counts[n])]


@pytest.mark.parametrize("stops", [(), (5, 17, 40, 77)])
@pytest.mark.parametrize("count", [1, 9, HISTORY + 3])
@pytest.mark.parametrize("texts", [1, 3, 4])
def test_greedy_is_that_of_the_cpu_engine(texts: int, count: int, stops: tuple[int, ...]) -> None:
    held, slots = weights(), list(range(texts))[::-1]
    with CpuEngine(held, 100, slots=texts) as other:
        engine, rows = CudaEngine(held, 100, slots=texts), []
        for one in (engine, other):
            for slot in slots:
                one.prefill(some_tokens(3 + slot, seed=slot), slot)
            rows.append(one.greedy(slots, count, stops, slots))
            rows.append(one.greedy(rows[-1][-1], 2, (), slots))
        assert rows[:2] == rows[2:]
        assert engine.kv.lengths == other.kv.lengths
        assert engine.hidden == pytest.approx(other.hidden, abs=1e-4)
        if not stops:
            assert (engine.active_neurons, engine.seen_neurons) == (other.active_neurons, other.seen_neurons)


def test_more_sequences_than_a_step_has_rows() -> None:
    held, slots = weights(), list(range(37))
    engine = CudaEngine(held, 8, slots=37)
    rows = engine.decode(slots, slots)
    assert engine.kv.lengths == [1] * 37
    alone = CudaEngine(held, 8)
    for slot in (0, 31, 32, 36):
        torch.testing.assert_close(rows[slot], alone.step([slot])[0], rtol=1e-4, atol=1e-4)
        alone.truncate(0)


def test_checked_drafts_are_those_that_greedy_decoding_takes() -> None:
    held = weights()
    plain = [row[0] for row in CudaEngine(held, 40).greedy([1], 12)]
    engine = CudaEngine(held, 40, slots=2)
    engine.prefill([7, 8], 0)
    wrong = [*plain[:3], (plain[3] + 1) % 96, plain[4]]
    assert engine.verify([[1, *wrong], [9]], (1, 0), (None, None))[0] == plain[:4]
    assert engine.kv.lengths == [3, 4]
    assert engine.verify([[plain[3], *plain[4:8]]], (1,)) == [plain[4:9]]
    assert engine.kv.lengths == [3, 9]


def test_rows_that_fill_up_a_batch_change_nothing() -> None:
    held, texts = weights(), [some_tokens(6, seed=n) for n in range(3)]
    engine = CudaEngine(held, 30, slots=3)
    for slot, text in enumerate(texts):
        engine.prefill(text, slot)
    before = [part[:, :, : engine.kv.capacity].clone() for part in (*engine.kv.keys, *engine.kv.values)]
    engine.prepare()  # its rows are all of this kind
    engine.decode([1, 2, 3], [0, 1, 2])  # a batch of four
    for old, part in zip(before, (*engine.kv.keys, *engine.kv.values), strict=True):
        assert torch.equal(old[:, :, :6], part[:, :, :6])
        assert (part[:, :, 7 : engine.kv.capacity] == 0).all()


def test_a_sequence_that_was_not_finite_leaves_nothing_behind() -> None:
    held = weights()
    engine, clean = CudaEngine(held, 40), CudaEngine(held, 40)
    slot = engine.acquire(30)
    engine.prefill(some_tokens(20), slot)
    for part in engine.kv.values:
        part[:, :, :30] = torch.nan
    with pytest.raises(NotFiniteError, match="the largest logit is nan"):
        engine.greedy([1], 3)
    engine.release(slot)
    assert engine.greedy([1], 9) == clean.greedy([1], 9)


def test_the_cache_grows_and_a_cache_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    held = weights()
    engine, large = CudaEngine(held, 8), CudaEngine(held, 400)
    text, expected, token = [], [], [4]
    for room in (6, 300, 400):
        engine.reserve(room)
        fresh = engine.greedy(token, 2)
        text, token = text + fresh, fresh[-1]
    for _ in range(3):
        expected += large.greedy(expected[-1] if expected else [4], 2)
    assert text == expected
    monkeypatch.setattr("minitron.engine.cuda.cache.free_memory", lambda device: 100_000)
    with pytest.raises(
        ValueError, match=r"4 slots with 500 tokens each takes 0.00 GB, and 0.00 GB are free on cpu; \d"
    ):
        CudaEngine(held, 500, slots=4)
    with pytest.raises(ValueError, match="use a shorter sequence or fewer slots"):
        engine.reserve(5000)
    assert engine.kv.capacity == 512


def test_bf12_is_refused() -> None:
    held = from_model(tiny_model(torch.bfloat16), "bf12")
    with pytest.raises(ValueError, match="weights are bf12; the CUDA engine reads bf16, fp16, fp32, int8, int4"):
        CudaEngine(held, 8)


def test_a_step_can_be_compiled() -> None:
    held, tokens = weights(), some_tokens(8)
    plain = logits_of(CudaEngine(held, 8), tokens, 4, 2)
    torch.testing.assert_close(logits_of(CudaEngine(held, 8, compiled="eager"), tokens, 4, 2), plain)


def test_other_pieces_of_a_step_are_used() -> None:
    class Doubled(TorchSteps):
        def head(self, x: torch.Tensor, weights: EngineWeights) -> tuple[torch.Tensor, torch.Tensor]:
            hidden, logits = super().head(x, weights)
            return hidden, 2 * logits

    held = weights()
    torch.testing.assert_close(CudaEngine(held, 8, steps=Doubled()).step([3]), 2 * CudaEngine(held, 8).step([3]))
