"""Both engines against the model in float64, and against each other."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from engine_models import VARIANTS, logits_of, some_tokens, tiny_model, unpacked

from minitron.engine.cpu import engine as cpu
from minitron.engine.matrix import Format
from minitron.engine.reference import ReferenceEngine
from minitron.engine.weights import EngineWeights, from_model

ENGINES = {"reference": ReferenceEngine, "cpu": cpu.CpuEngine}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_no_worse_than_the_models(kind: str, dtype: torch.dtype, variant: str) -> None:
    model = tiny_model(dtype, **VARIANTS[variant])
    tokens = some_tokens(24, model.config.vocab_size)
    with torch.inference_mode():
        own = model(torch.tensor([tokens])).logits[0, 9:].double()
        exact = model.double()(torch.tensor([tokens])).logits[0, 9:]
    model.to(dtype)
    found = logits_of(ENGINES[kind](from_model(model), 24), tokens, 9, 4)
    error, allowed = (found - exact).square().mean().sqrt(), (own - exact).square().mean().sqrt()
    assert error <= 1.1 * allowed + 1e-6


def test_reference_in_float64_is_the_model() -> None:
    model = tiny_model(torch.float64, attention_bias=True, mlp_bias=True)
    tokens = some_tokens(24)
    weights = from_model(model)
    found = logits_of(ReferenceEngine(weights, 24), tokens, 10, 3)
    with torch.inference_mode():
        assert torch.allclose(found, model(torch.tensor([tokens])).logits[0, 10:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", ["odd heads", "biases, tied", "odd widths", "no layers"])
@pytest.mark.parametrize("format", ["bf12", "int8", "int4"])
def test_packed_weights_give_the_logits_of_the_same_numbers(format: Format, variant: str) -> None:
    model = tiny_model(torch.bfloat16, **VARIANTS[variant])
    weights, tokens = from_model(model, format), some_tokens(24, model.config.vocab_size)
    expected = logits_of(ReferenceEngine(unpacked(weights), 24), tokens, 8, 8)
    found = logits_of(cpu.CpuEngine(weights, 24), tokens, 8, 3)
    error, size = (found - expected).square().mean().sqrt(), expected.square().mean().sqrt()
    assert error <= 0.01 * size  # keys and values are bf16 in one and fp32 in the other
    torch_read = logits_of(ReferenceEngine(weights, 24), tokens, 8, 8)
    assert (torch_read - expected).square().mean().sqrt() <= 0.03 * size


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_greedy_tokens_in_one_call_are_those_of_single_steps(format: Format) -> None:
    weights = from_model(tiny_model(torch.bfloat16), format)
    for seed in range(4):
        start = some_tokens(5, seed=seed)
        engine = cpu.CpuEngine(weights, 40, threads=2)
        engine.prefill(start)
        token, expected = 1, []
        for _ in range(20):
            token = int(engine.step([token])[0].argmax())
            expected.append(token)
        seen = engine.seen_neurons, engine.active_neurons
        engine.truncate(5)
        assert [row[0] for row in engine.greedy([1], 20)] == expected
        assert (engine.seen_neurons, engine.active_neurons) == (2 * seen[0], 2 * seen[1])
        engine.truncate(5)
        stop = expected[6]
        assert [row[0] for row in engine.greedy([1], 20, {stop})] == expected[: expected.index(stop) + 1]
        assert engine.greedy([stop], 2)[0][0] == expected[expected.index(stop) + 1]
        engine.close()


@pytest.mark.parametrize("format", ["fp32", "bf16", "bf12", "int8", "int4"])
def test_thread_counts_and_pieces_give_the_same_bits(format: Format) -> None:
    weights = from_model(tiny_model(torch.bfloat16, intermediate_size=700, mlp_bias=True, head_dim=12), format)
    tokens = some_tokens(40)
    expected = logits_of(cpu.CpuEngine(weights, 40, threads=1), tokens, 3, 1)
    for threads in (1, 2, 3, 5):
        for piece in (1, 5, 8):
            found = logits_of(cpu.CpuEngine(weights, 40, threads=threads), tokens, 3, piece)
            assert torch.equal(found, expected), (threads, piece)


@pytest.mark.parametrize("kind", ENGINES)
def test_prompt_lengths_around_the_chunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.engine.reference.CHUNK", 16)
    weights = from_model(tiny_model(torch.float32))
    tokens = some_tokens(50)
    whole = logits_of(ReferenceEngine(weights, 50), tokens, 0, 50)
    for length in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48):
        found = logits_of(ENGINES[kind](weights, 50), tokens[: length + 1], length, 1)
        assert torch.allclose(found[0], whole[length], atol=1e-4), length


@pytest.mark.parametrize("kind", ENGINES)
def test_forgetting_tokens(kind: str) -> None:
    engine = ENGINES[kind](from_model(tiny_model()), 30)
    tokens = some_tokens(20)
    engine.prefill(tokens[:10])
    expected = engine.step(tokens[10:14]).clone()
    engine.truncate(10)
    engine.step(some_tokens(5, seed=7))
    engine.truncate(10)
    assert torch.equal(engine.step(tokens[10:14]), expected)
    engine.close()


def test_both_engines_count_the_same_zeros() -> None:
    weights, tokens = from_model(tiny_model()), some_tokens(12)
    counts = []
    for kind in ENGINES.values():
        engine = kind(weights, 12)
        engine.step(tokens[:8])
        engine.close()
        counts.append((engine.active_neurons, engine.seen_neurons))
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < counts[0][1] == 8 * 96 * 2


def test_rows_of_zero_neurons_are_not_read() -> None:
    model = tiny_model(mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.bias[::2] = -1e6
    weights = from_model(model)
    tokens = some_tokens(10)
    expected = logits_of(cpu.CpuEngine(weights, 10), tokens, 2, 1)
    for layer in weights.layers:
        layer.down.data[::2] = torch.nan
    assert torch.equal(logits_of(cpu.CpuEngine(weights, 10), tokens, 2, 1), expected)


def test_nothing_is_written_past_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = from_model(tiny_model(torch.bfloat16, intermediate_size=131, hidden_size=33, vocab_size=97))
    arrays: list[tuple[np.ndarray, np.ndarray]] = []

    def guarded(shape, dtype=float) -> np.ndarray:
        size = int(np.prod(shape))
        whole = np.full(size + 64, 99, dtype)
        inside = whole[32 : 32 + size].reshape(shape)
        inside[...] = 0
        arrays.append((whole, inside))
        return inside

    monkeypatch.setattr(cpu.np, "zeros", guarded)
    plain = {torch.bfloat16: np.int16, torch.float32: np.float32, torch.int32: np.int32}

    def guarded_tensor(shape, dtype, device) -> torch.Tensor:
        return torch.from_numpy(guarded(shape, plain[dtype])).view(dtype)

    monkeypatch.setattr(torch, "zeros", guarded_tensor)
    engine = cpu.CpuEngine(weights, 24, threads=3)
    monkeypatch.undo()
    logits_of(engine, some_tokens(24), 0, 8)
    assert len(arrays) >= 16  # scratch, and the keys and values of two layers
    for whole, inside in arrays:
        assert (whole[:32] == 99).all()
        assert (whole[32 + inside.size :] == 99).all()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_parts_that_threads_take_as_they_are_free_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, format: Format, groups: int
) -> None:
    shape = {"num_attention_heads": 8, "num_key_value_heads": groups, "head_dim": 8, "vocab_size": 1100}
    model = tiny_model(torch.bfloat16, **shape, intermediate_size=700, num_hidden_layers=3)
    weights, tokens = from_model(model, format), some_tokens(60)

    def texts(threads: int) -> tuple[torch.Tensor, list[list[int]]]:
        with cpu.CpuEngine(weights, 120, threads=threads, slots=2) as engine:
            for slot in range(2):  # prompts in steps whose logits nobody wants
                for first in range(0, 20, 4):
                    engine.prefill(tokens[first + slot : first + slot + 4], slot)
            logits = torch.cat([engine.step(tokens[at : at + 1 + at % 3], 0).clone() for at in range(20, 50)])
            return logits, engine.greedy(tokens[:2], 30, slots=(0, 1))

    expected = texts(1)
    monkeypatch.setattr(cpu, "SMALL", 0)  # as for a large model
    for threads in (1, 2, 3, 5):
        assert cpu.CpuEngine(weights, 8, threads=threads)._arguments[6][cpu.tables.FIXED_SHARES] == 0
        logits, chosen = texts(threads)
        assert torch.equal(logits, expected[0]), threads
        assert chosen == expected[1], threads


def test_wrong_use_is_refused() -> None:
    weights = from_model(tiny_model())
    engine = cpu.CpuEngine(weights, 4)
    with pytest.raises(AssertionError, match="vocabulary"):
        engine.step([96])
    with pytest.raises(AssertionError, match="cache of 4"):
        engine.step([1] * 5)
    with pytest.raises(AssertionError, match="tokens in one step"):
        engine.step([])
    with pytest.raises(ValueError, match="fp64"):
        cpu.CpuEngine(from_model(tiny_model(torch.float64)), 4)


def test_threads_end_with_the_engine() -> None:
    weights = from_model(tiny_model())
    before = threading.active_count()
    with cpu.CpuEngine(weights, 8, threads=4) as engine:
        engine.step([1])
        assert threading.active_count() == before + 3
        engine.close()
        assert threading.active_count() == before
        engine.step([2])  # starts them again
    assert threading.active_count() == before


def test_packing_shares_all_but_the_transposed_matrix() -> None:
    model = tiny_model()
    weights: EngineWeights = from_model(model)
    attn = model.model.layers[0].self_attn
    assert weights.layers[0].q.data.data_ptr() == attn.q_proj.weight.data_ptr()
    assert torch.equal(weights.layers[1].down.data, model.model.layers[1].mlp.down_proj.weight.T)
    assert weights.nbytes == 4 * sum(p.numel() for n, p in model.named_parameters() if "norm" not in n)


@pytest.mark.parametrize("format", ["fp32", "bf16", "bf12", "int8", "int4"])
def test_texts_side_by_side_have_the_bits_of_each_alone(format: Format) -> None:
    weights = from_model(tiny_model(torch.bfloat16, intermediate_size=300), format)
    lengths = (3, 12, 1, 20, 7, 9, 2, 15, 4, 6) * 4  # more texts than one step takes
    texts = [some_tokens(n, seed=index) for index, n in enumerate(lengths)]
    expected = [logits_of(cpu.CpuEngine(weights, 30), text, len(text) - 1, 1)[-1] for text in texts]
    engine = cpu.CpuEngine(weights, 30, threads=2, slots=len(texts))
    for slot, text in enumerate(texts):
        engine.prefill(text[:-1], slot)
    slots = list(range(len(texts)))[::-1]
    found = engine.decode([texts[slot][-1] for slot in slots], slots)
    assert engine.kv.lengths == [len(text) for text in texts]
    for slot, row in zip(slots, found, strict=True):
        assert torch.equal(row, expected[slot])
    engine.close()


@pytest.mark.parametrize("format", ["fp32", "bf16", "bf12", "int8", "int4"])
def test_a_prompt_has_the_bits_of_single_steps_however_it_is_divided(format: Format) -> None:
    weights = from_model(tiny_model(torch.bfloat16, intermediate_size=300), format)
    tokens = some_tokens(min(75, cpu.CpuEngine(weights, 1).short_prompt))
    cached = []
    for threads, pieces in ((1, [1] * 75), (1, [75]), (2, [75]), (2, [3, 31, 2, 39])):
        with cpu.CpuEngine(weights, 75, threads=threads) as engine:
            first = 0
            for piece in pieces:
                engine.prefill(tokens[first : first + piece])
                first += piece
            cached.append([*engine.kv.keys, *engine.kv.values])
    for found in cached[1:]:
        assert all(map(torch.equal, found, cached[0]))


def test_no_other_pool_of_threads_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.np.ufunc import parallel

    monkeypatch.setattr(cpu.CpuEngine, "short_prompt", 8)
    before = parallel._is_initialized, torch.get_num_threads()
    with cpu.CpuEngine(from_model(tiny_model()), 60, threads=2) as engine:
        engine.prefill(some_tokens(40))  # by torch, whose threads sleep before the engine's are started
        assert not engine._running
        engine.greedy([1], 10)
    assert (parallel._is_initialized, torch.get_num_threads()) == before
