"""Speculation for batches: each text is that of plain batched decoding, whatever is drafted and whenever it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import some_tokens, tiny_model
from forced_drafts import force_drafts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from minitron import NemotronForCausalLM
from minitron.engine.speculate import PROBES
from minitron.engine_hook import Speculation


@pytest.fixture(autouse=True)
def drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are always tried: these models are too small and their texts too short for drafts to pay."""
    force_drafts(monkeypatch)


def batch(lengths: list[int], words: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of few different tokens, padded on the left."""
    some, longest = some_tokens(words, seed=seed), max(lengths)
    rows = [[some[pick] for pick in some_tokens(n, vocabulary=words, seed=seed + n)] for n in lengths]
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])}


MODELS = {dtype: tiny_model(dtype) for dtype in (torch.float32, torch.bfloat16)}
DRAFTS: dict[str, Any] = {
    "lookup": "lookup",
    "self": "self",
    "another model": tiny_model(num_hidden_layers=1),
    "a twin": tiny_model(),
}
RULES = (
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"do_sample": True, "temperature": 0.4},
    {"do_sample": True, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2},
)


def generated(model: NemotronForCausalLM, seed: int, **request: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The texts, and the state of torch's generator after them."""
    torch.manual_seed(seed)
    return model.generate(pad_token_id=0, **request), torch.get_rng_state()


def speculation(model: NemotronForCausalLM) -> Speculation:
    report = model.last_generation
    assert report is not None
    assert report.speculation is not None, report.reason
    return report.speculation


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=16),
    rules=st.sampled_from(RULES),
    draft=st.sampled_from(sorted(DRAFTS)),
    ends=st.sets(st.integers(0, 95), max_size=12),
    dtype=st.sampled_from(sorted(MODELS, key=str)),
    new_tokens=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_texts_and_numbers_are_those_of_plain_decoding(
    lengths: list[int], rules: dict, draft: str, ends: set[int], dtype: torch.dtype, new_tokens: int, seed: int
) -> None:
    model = MODELS[dtype]
    request = {**batch(lengths, seed=seed), **rules, "max_new_tokens": new_tokens, "eos_token_id": sorted(ends) or None}
    plain, state = generated(model, seed, **request)
    ours, state_after = generated(model, seed, **request, draft=DRAFTS[draft])
    assert torch.equal(ours, plain)
    assert torch.equal(state_after, state)
    found = speculation(model)
    assert not found.reason
    count = 0
    for row in plain[:, max(lengths) :].tolist():
        count += next((at for at, token in enumerate(row, 1) if token in ends), len(row))
    assert found.tokens == count
    assert 0 <= found.kept <= found.drafted
    # A step gives each of its texts the tokens that were kept and one more; of these an end may drop some.
    lucky = sum(PROBES) * len(lengths)  # a text that repeats its last token accepts what a probe guesses
    assert found.tokens <= found.steps + found.kept + lucky


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_drafts_of_a_batch_are_kept(draft: str, rules: dict) -> None:
    """Also against transformers' own path."""
    model = MODELS[torch.float32]
    request = {**batch([30, 18, 25, 1]), **rules, "max_new_tokens": 40, "eos_token_id": None}
    ours, _ = generated(model, 3, **request, draft=DRAFTS[draft])
    found = speculation(model)
    assert torch.equal(ours, generated(model, 3, **request, engine="off")[0])
    assert found.drafted > 0
    if draft in ("self", "a twin"):
        assert found.kept > 0
        assert found.tokens_per_step > 1
    if draft == "a twin" and rules == RULES[0]:
        assert found.acceptance_rate == 1


def test_texts_end_at_different_times() -> None:
    model, request = MODELS[torch.float32], {**batch([9, 4, 12, 7]), "do_sample": False}
    free = model.generate(**request, max_new_tokens=30, pad_token_id=0)[:, 12:]
    ends = [int(free[0, 3]), int(free[1, 17])]
    plain = model.generate(**request, max_new_tokens=30, pad_token_id=0, eos_token_id=ends)
    for draft in DRAFTS.values():
        ours = model.generate(**request, max_new_tokens=30, pad_token_id=0, eos_token_id=ends, draft=draft)
        assert torch.equal(ours, plain)
    lengths = {next((at for at, token in enumerate(row) if token in ends), 30) for row in plain[:, 12:].tolist()}
    assert len(lengths) > 1


def test_several_texts_of_one_prompt() -> None:
    model, request = MODELS[torch.float32], {**batch([20]), "do_sample": True, "temperature": 0.5}
    texts = [
        generated(model, 1, **request, max_new_tokens=25, num_return_sequences=5, **more)[0]
        for more in ({}, {"draft": "self"}, {"draft": "lookup"})
    ]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert len({tuple(row) for row in texts[0].tolist()}) == 5


@pytest.mark.parametrize("assistant", ["prompt_lookup_num_tokens", "assistant_model"])
def test_transformers_own_arguments_serve_a_batch(assistant: str) -> None:
    model, request = MODELS[torch.float32], {**batch([20, 8, 3]), "do_sample": False, "max_new_tokens": 20}
    value = 3 if assistant == "prompt_lookup_num_tokens" else DRAFTS["another model"]
    ours, _ = generated(model, 0, **request, **{assistant: value})
    assert speculation(model).drafted > 0
    assert torch.equal(ours, generated(model, 0, **request)[0])


class Sees(StoppingCriteria):
    """Ends the texts one after the other, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.asked.append(input_ids.tolist())
        return torch.tensor([input_ids.shape[1] >= 25 + 4 * row for row in range(len(input_ids))])


class Collect:
    def __init__(self) -> None:
        self.columns: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.columns.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_streamers_and_criteria_are_called_as_in_plain_decoding(draft: str, rules: dict) -> None:
    model, calls = MODELS[torch.float32], []
    for more in ({}, {"draft": DRAFTS[draft]}):
        sees, collect = Sees(), Collect()
        request = {
            **batch([20, 6, 11]),
            **rules,
            "max_new_tokens": 40,
            "stopping_criteria": StoppingCriteriaList([sees]),
        }
        texts, state = generated(model, 2, **request, streamer=collect, **more)
        calls.append((texts.tolist(), state.tolist(), sees.asked, collect.columns, collect.ended))
    assert speculation(model).drafted > 0
    assert calls[0] == calls[1]


class Same(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


WITHOUT = {
    "more than 16 texts": {"num_return_sequences": 6, "do_sample": True},
    "logits processors of the caller's own": {"logits_processor": LogitsProcessorList([Same()]), "do_sample": False},
    "scores or a cache are returned": {"return_dict_in_generate": True, "output_scores": True, "do_sample": False},
    "the engine 'cuda'": {"engine": "cuda", "do_sample": False},
}


@pytest.mark.parametrize("reason", WITHOUT)
@pytest.mark.parametrize("draft", [{"draft": "lookup"}, {"draft": "self"}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_draft_that_cannot_serve_a_batch_says_why(reason: str, draft: dict) -> None:
    model, request = MODELS[torch.float32], {**batch([20, 6, 11]), "max_new_tokens": 9, **WITHOUT[reason]}
    if "prompt_lookup_num_tokens" in draft and "num_return_sequences" in request:
        return  # refused by transformers
    ours, state = generated(model, 0, **request, **draft)
    found = speculation(model)
    assert reason in found.reason
    assert (found.drafted, found.steps) == (0, 0)
    plain, state_of_plain = generated(model, 0, **request)
    if "return_dict_in_generate" in request:
        assert torch.equal(torch.stack(ours.scores), torch.stack(plain.scores))
        ours, plain = ours.sequences, plain.sequences
    assert torch.equal(ours, plain)
    assert torch.equal(state, state_of_plain)


def test_a_draft_is_refused_for_a_batch_that_it_cannot_serve_too() -> None:
    with pytest.raises(ValueError, match="draft is 'fast'"):
        MODELS[torch.float32].generate(**batch([3] * 20), max_new_tokens=3, pad_token_id=0, draft="fast")


@pytest.mark.parametrize("draft", [{"draft": "lookup"}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_the_callers_cache_is_filled(draft: dict) -> None:
    model, caches = MODELS[torch.float32], []
    for more in ({}, draft):
        cache = DynamicCache(config=model.config)
        model.generate(**batch([20]), max_new_tokens=9, do_sample=False, past_key_values=cache, **more)
        caches.append(cache)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 28
    assert torch.equal(caches[0].layers[0].keys, caches[1].layers[0].keys)
    assert "cache" in speculation(model).reason
