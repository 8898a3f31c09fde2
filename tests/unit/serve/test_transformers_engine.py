"""Serving through transformers' forward pass: the tokens of `generate`, one answer one answer, and metrics say so."""

from __future__ import annotations

import random

import pytest
import torch
from served_sequences import Wanted, run

pytest.importorskip("starlette", reason="pip install 'minitron[serve]'")
pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from minitron.sampling_parameters import SamplingParameters
from minitron.serve.metrics import Metrics
from minitron.serve.scheduler import Scheduler
from minitron.serve.served import ServedModel
from minitron.serve.token_choice import TokenRules
from minitron.serve.transformers_engine import TransformersEngine

VOCABULARY = 96


@pytest.fixture(scope="module")
def model():
    """An architecture that only transformers runs."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def wanted(seed: int, length: int, limit: int, temperature: float = 0.0) -> Wanted:
    chance = random.Random(seed)
    prompt = tuple(chance.randrange(VOCABULARY) for _ in range(length))
    return Wanted(prompt, TokenRules(SamplingParameters(temperature=temperature, seed=seed)), limit, frozenset())


def answer(scheduler: Scheduler, one: Wanted) -> list[int]:
    sequence = one.sequence(VOCABULARY)
    return run(scheduler, {sequence: 0}, {0: [sequence]})[0][0]


def test_greedy_tokens_are_those_of_generate(model) -> None:
    scheduler = Scheduler(TransformersEngine(model, 128, 2), chunk=16)
    for seed, length in enumerate((1, 2, 16, 17, 50)):
        one = wanted(seed, length, 20)
        expected = model.generate(torch.tensor([one.prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert answer(scheduler, one) == expected[0, length:].tolist()


def test_requests_together_are_those_alone_whoever_leaves(model) -> None:
    engine = TransformersEngine(model, 128, 3)
    asked = [wanted(seed, 5 + 9 * seed, 10, temperature=float(seed % 2)) for seed in range(7)]
    expected = [answer(Scheduler(engine, chunk=16), one) for one in asked]
    assert expected[1] != expected[3]  # sampled, with seeds of their own
    sequences = {one.sequence(VOCABULARY): number for number, one in enumerate(asked)}
    scheduler, first = Scheduler(engine, chunk=16), next(iter(sequences))
    joins = {3 * (number // 2): [] for number in range(len(asked))}
    for sequence, number in sequences.items():
        joins[3 * (number // 2)].append(sequence)
    scheduler.submit(*joins.pop(0))
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(first)
    found = run(scheduler, sequences, {0: [s for group in joins.values() for s in group]})
    early = [update for sequence, update in scheduler.outbox]
    assert not early
    assert first.ended
    assert len(first.tokens) < 10
    assert [sequence.tokens for sequence in list(sequences)[1:]] == expected[1:]
    assert set(found) == set(range(len(asked)))
    assert engine.kv.taken == set()
    assert engine.kv.lengths == [0, 0, 0]


def test_a_slot_can_be_cut_and_goes_on_as_before(model) -> None:
    engine = TransformersEngine(model, 128, 1)
    engine.acquire(32)
    logits = engine.step([3, 5, 7, 9])
    engine.truncate(2)
    assert engine.kv.lengths == [2]
    assert float((engine.step([7, 9]) - logits[2:]).abs().max()) < 1e-5


def test_hidden_states_are_those_before_the_head(model) -> None:
    engine = TransformersEngine(model, 128, 2)
    slots = [engine.acquire(32), engine.acquire(32)]
    engine.prefill([3, 5], slots[0])
    engine.prefill([4], slots[1])
    logits = engine.decode([7, 9], slots)
    assert engine.hidden.shape == (2, 32)
    with torch.inference_mode():
        from_hidden = model.get_output_embeddings()(torch.from_numpy(engine.hidden))
        assert float((from_hidden - logits).abs().max()) < 1e-5


def test_metrics_say_which_engine_runs_and_why(model) -> None:
    engine = TransformersEngine(model, 128, 1)
    served = ServedModel("neo", None, model, 128, VOCABULARY, Scheduler(engine), "model_type is gpt_neox")
    text = Metrics().text([served]).decode()
    assert 'engine="transformers",model_name="neo",reason="model_type is gpt_neox"} 1.0' in text
