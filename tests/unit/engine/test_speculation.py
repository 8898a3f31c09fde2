"""Speculation: the same text as without it, the same distribution when sampling, and what is reported."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from engine_models import some_tokens, tiny_model
from forced_drafts import force_drafts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from minitron import NemotronForCausalLM
from minitron.engine import draft_choice
from minitron.engine.cpu.engine import CpuEngine
from minitron.engine.draft_length import DraftLength
from minitron.engine.drafts import Lookup
from minitron.engine.draws import Draws
from minitron.engine.model_weights import has_copies, weights_of
from minitron.engine.mt19937 import seeded
from minitron.engine.reference import ReferenceEngine
from minitron.engine.sampling import acceptance, residual
from minitron.sampling_parameters import SamplingParameters


@pytest.fixture(autouse=True)
def drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are always tried: these models are too small and their texts too short for drafts to pay."""
    force_drafts(monkeypatch)


def repetitive(seed: int, words: int = 6, length: int = 40) -> torch.Tensor:
    some = some_tokens(words, seed=seed)
    picks = some_tokens(length, vocabulary=words, seed=seed + 100)
    return torch.tensor([[some[pick] for pick in picks]])


class Repeat(LogitsProcessor):
    """Makes the tokens of the prompt likely, so that drafts are kept."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, input_ids[0, -6:], 3.0) + scores


DRAFTS = {
    "lookup": lambda model: {"draft": "lookup"},
    "prompt_lookup_num_tokens": lambda model: {"prompt_lookup_num_tokens": 4},
    "another model": lambda model: {"draft": tiny_model(seed=1)},
    "assistant_model": lambda model: {"assistant_model": tiny_model(num_hidden_layers=1)},
    "a twin": lambda model: {"draft": tiny_model()},
    "self": lambda model: {"draft": "self"},
    "its weights": lambda model: {"draft": weights_of(tiny_model())},
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_text_is_that_of_plain_decoding(draft: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    for seed, rules in itertools.product(range(3), ({}, {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 3})):
        ids = repetitive(seed)
        plain = model.generate(ids, max_new_tokens=40, do_sample=False, **rules)
        ours = model.generate(ids, max_new_tokens=40, do_sample=False, **rules, **DRAFTS[draft](model))
        assert torch.equal(ours, plain)
        report = model.last_generation
        assert report.engine == "cpu", report.reason
        assert report.speculation.tokens == plain.shape[1] - ids.shape[1]
        if draft == "a twin" and dtype == torch.float32 and not rules:
            assert report.speculation.acceptance_rate == 1
            assert report.speculation.kept > 0


@pytest.mark.parametrize("draft", ["lookup", "prompt_lookup_num_tokens"])
def test_a_looked_up_draft_leaves_the_draws_of_a_seed(draft: str) -> None:
    model, kept = tiny_model(), 0
    for seed in range(12):
        texts = []
        for speculation in ({}, DRAFTS[draft](model)):
            torch.manual_seed(seed)
            how = {"do_sample": True, "temperature": 0.6, "top_k": 5, **speculation}
            texts.append(model.generate(repetitive(seed), max_new_tokens=40, **how))
        assert torch.equal(*texts)
        kept += model.last_generation.speculation.kept
    assert kept > 0


def test_the_same_seed_gives_the_same_text_with_a_drawn_draft() -> None:
    model, texts = tiny_model(), []
    draft = tiny_model(num_hidden_layers=1)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(repetitive(0), max_new_tokens=30, do_sample=True, draft=draft)[0].tolist())
    assert texts[0] == texts[1] != texts[2]


distributions = st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda values: sum(values) > 1e-3)


@settings(max_examples=300, deadline=None)
@given(distributions, st.data())
def test_kept_and_replaced_tokens_together_have_the_models_law(values: list[float], data: st.DataObject) -> None:
    # A distribution may give tokens no probability, as top-k does.
    size = {"min_size": len(values), "max_size": len(values)}
    other = data.draw(st.lists(st.floats(0, 1), **size).filter(lambda values: sum(values) > 1e-3))
    p, q = np.array(values) / sum(values), np.array(other) / sum(other)
    kept = q * acceptance(p, q)
    assert np.abs(kept + (1 - kept.sum()) * residual(p, q) - p).max() < 1e-12


def distribution_of_texts(model: NemotronForCausalLM, ids: torch.Tensor, length: int, how: dict) -> dict[tuple, float]:
    """The product of the distributions that transformers' own path has at each position."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, probability in texts.items():
            past = torch.cat([ids, torch.tensor([text], dtype=torch.long)], 1)
            asked = {**how, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
            out = model.generate(past, attention_mask=torch.ones_like(past), engine="off", **asked)
            for token, p in enumerate(out.scores[0][0].double().softmax(-1).tolist()):
                if p > 0:
                    longer[(*text, token)] = probability * p
        texts = longer
    return texts


@pytest.mark.parametrize("how", [{"top_k": 0}, {"top_k": 3, "temperature": 0.8}], ids=str)
def test_texts_have_the_law_of_the_model(how: dict) -> None:
    shape = {"vocab_size": 6, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    model, draft = tiny_model(**shape), tiny_model(seed=1, num_hidden_layers=0, **shape)
    ids, count, drafted, kept = torch.tensor([[1, 2]]), 1500, 0, 0
    how = {"do_sample": True, "eos_token_id": None, "pad_token_id": 0, **how}
    expected = distribution_of_texts(model, ids, 3, how)
    assert abs(sum(expected.values()) - 1) < 1e-9
    torch.manual_seed(0)
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(count):
        found[tuple(model.generate(ids, draft=draft, max_new_tokens=3, **how)[0, 2:].tolist())] += 1
        drafted += model.last_generation.speculation.drafted
        kept += model.last_generation.speculation.kept
    assert 0.1 * drafted < kept < 0.9 * drafted
    assert set(found) <= set(expected)
    # Pearson's statistic; texts too rare for it are one class.
    classes = [(found[text], count * p) for text, p in expected.items() if count * p >= 5]
    classes.append((count - sum(n for n, _ in classes), count - sum(e for _, e in classes) + 1e-9))
    statistic, freedom = sum((n - e) ** 2 / e for n, e in classes), len(classes) - 1
    assert freedom > 10
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)


class AfterTwenty(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        assert input_ids.shape[1] <= 53  # asked after every token, not after every step
        return torch.tensor([input_ids.shape[1] >= 53])


class Collect:
    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("draft", ["lookup", "a twin"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_criteria_and_streaming(draft: str, do_sample: bool) -> None:
    model, streamer = tiny_model(), Collect()
    how = {
        "max_new_tokens": 40,
        "do_sample": do_sample,
        "logits_processor": LogitsProcessorList([Repeat()]),
        "stopping_criteria": StoppingCriteriaList([AfterTwenty()]),
    }
    torch.manual_seed(0)
    out = model.generate(repetitive(1), streamer=streamer, **how, **DRAFTS[draft](model))
    assert model.last_generation.engine == "cpu"
    assert out.shape == (1, 53)
    assert streamer.tokens == [out[0, :40].tolist(), *([token] for token in out[0, 40:].tolist())]
    assert streamer.ended
    torch.manual_seed(0)
    if not do_sample or draft == "lookup":
        assert torch.equal(out, model.generate(repetitive(1), **how))


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 9])
def test_a_text_ends_where_it_shall(new_tokens: int) -> None:
    model = tiny_model()
    for draft in ("lookup", tiny_model()):
        out = model.generate(repetitive(2), max_new_tokens=new_tokens, do_sample=False, draft=draft)
        assert out.shape[1] == 40 + new_tokens
    free = model.generate(repetitive(2), max_new_tokens=30, do_sample=False)
    for end in set(free[0, 40:].tolist()):
        how = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": end}
        assert torch.equal(
            model.generate(repetitive(2), draft=tiny_model(), **how), model.generate(repetitive(2), **how)
        )


def test_what_a_draft_cannot_be() -> None:
    model = tiny_model()
    for draft, said in (
        ("fast", "draft is 'fast'"),
        (tiny_model(vocab_size=90), "90 tokens, the model's 96"),
        (tiny_model(hidden_act="gelu"), "hidden_act is 'gelu'"),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(repetitive(0), max_new_tokens=3, draft=draft)


def test_requests_without_speculation_are_served_without() -> None:
    model = tiny_model()
    model.generate(repetitive(0), max_new_tokens=9, do_sample=False, draft="lookup", engine="off")
    assert model.last_generation.engine == "transformers"
    asked = {"return_dict_in_generate": True, "assistant_model": tiny_model(seed=1)}
    model.generate(repetitive(0), max_new_tokens=9, do_sample=False, **asked)
    assert model.last_generation.engine == "transformers"


def test_lookup_finds_the_latest_of_the_longest() -> None:
    lookup = Lookup()

    def following(text: list[int], count: int) -> list[int]:
        return lookup.propose([text], count)[0].tokens

    assert following([1, 2, 3], 4) == []
    assert following([1, 2, 3, 4, 2, 3], 4) == [4, 2, 3]
    assert following([1, 2, 3, 4, 2, 3, 5, 9, 2, 3], 2) == [5, 9]
    assert following([1, 2, 3, 4, 2, 3, 5, 9, 2, 3, 4, 2, 3], 2) == [5, 9]
    assert following([1, 2, 3, 4, 2, 3, 5, 9, 2, 3, 4, 2, 3, 1, 2, 3], 1) == [4]


def test_a_copy_of_the_weights_is_made_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_choice, "DraftLength", DraftLength)
    model, how = tiny_model(), {"max_new_tokens": 40, "do_sample": False}
    monkeypatch.setattr(draft_choice, "_pace", draft_choice._Pace(1.0))  # a weight a second
    text = model.generate(repetitive(0), draft="self", **how)
    assert not has_copies(model, "int4")
    assert model.last_generation.speculation.drafted == 0
    assert torch.equal(text, model.generate(repetitive(0), **how))


@pytest.mark.parametrize("engine", [CpuEngine, ReferenceEngine])
def test_verified_tokens_are_those_of_plain_decoding(engine: type[CpuEngine | ReferenceEngine]) -> None:
    weights, rng = weights_of(tiny_model()), random.Random(0)
    prompts = [some_tokens(5, seed=seed) for seed in range(3)]
    parameters = SamplingParameters(temperature=1.0, top_k=9, repetition_penalty=1.2)
    for drawn in (False, True):
        plain, checking = engine(weights, 40, slots=3), engine(weights, 40, slots=3)
        draws = [Draws(parameters, 96, [np.array(ids)], seeded(7), steps=9) if drawn else None for ids in prompts]
        expected, found = [], [ids[-1:] for ids in prompts]
        for slot, ids in enumerate(prompts):
            plain.prefill(ids[:-1], slot)
            checking.prefill(ids[:-1], slot)
            own = Draws(parameters, 96, [np.array(ids)], seeded(7))
            tokens = ids[-1:]
            for _ in range(20):
                logits = plain.step(tokens[-1:], slot).float().numpy()
                tokens.append(own.choose(logits, [0])[0] if drawn else int(logits.argmax()))
            expected.append(tokens)
        while all(len(tokens) < 15 for tokens in found):
            # Right tokens, then perhaps a wrong one.
            groups = [
                [*known[len(tokens) - 1 : len(tokens) + rng.randrange(2)], *[5] * rng.randrange(2)][:2]
                for tokens, known in zip(found, expected, strict=True)
            ]
            for tokens, chosen in zip(found, checking.verify(groups, [0, 1, 2], draws), strict=True):
                assert 1 <= len(chosen) <= 2
                tokens += chosen
        for slot, (tokens, known) in enumerate(zip(found, expected, strict=True)):
            assert tokens == known[: len(tokens)]
            assert checking.kv.lengths[slot] == 4 + len(tokens) - 1
        plain.close()
        checking.close()
