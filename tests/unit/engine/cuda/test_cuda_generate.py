"""`generate` with the CUDA engine's code on the CPU, against transformers' own path."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from engine_models import VARIANTS, some_tokens, tiny_model
from family_samples import KINDS, kind_config, small_model
from forced_drafts import force_drafts
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from minitron.engine.cuda import weights as cuda_weights
from minitron.engine.cuda.engine import CudaEngine
from minitron.engine_hook import ENGINE_CHOICE, GenerationReport
from minitron.families import FAMILIES
from minitron.family_models import causal_lm_class
from minitron.finite import NotFiniteError


def prompt(count: int = 5, seed: int = 3) -> torch.Tensor:
    return torch.tensor([some_tokens(count, seed=seed)])


def padded(*lengths: int) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(some_tokens(n, seed=n)) for n in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows):
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def both(model: Any, **request: Any) -> tuple[Any, Any]:
    ours = model.generate(engine="cuda", **request)
    assert model.last_generation.engine == "cuda", model.last_generation.reason
    return ours, model.generate(engine="off", **request)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_of_every_family_are_those_of_transformers(kind: str) -> None:
    config = kind_config(kind)
    model = causal_lm_class(FAMILIES[config.model_type])(config)
    model.load_state_dict(small_model(config).state_dict())
    ours, theirs = both(model.eval(), **padded(4, 9, 1), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_every_shape_are_those_of_transformers(variant: str) -> None:
    ours, theirs = both(tiny_model(**VARIANTS[variant]), input_ids=prompt(), max_new_tokens=25, do_sample=False)
    assert torch.equal(ours, theirs)


class Even(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.arange(1, 96, 2), -torch.inf)


class Long(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] > 15)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 9, "eos_token_id": list(range(30))},
        {"eos_token_id": list(range(10))},
        {"bad_words_ids": [[5], [7, 8]], "no_repeat_ngram_size": 2},
        {"logits_processor": LogitsProcessorList([Even()]), "stopping_criteria": StoppingCriteriaList([Long()])},
    ],
    ids=["penalty", "minimum", "ends", "words", "own"],
)
def test_settings_mean_what_they_mean_to_transformers(settings: dict[str, Any]) -> None:
    ours, theirs = both(tiny_model(), **padded(3, 8, 5, 1, 6), max_new_tokens=30, do_sample=False, **settings)
    assert torch.equal(ours, theirs)


def test_scores_logits_cache_and_stream_are_those_of_transformers() -> None:
    class Tokens(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value)

        def end(self) -> None:
            self.seen.append(torch.empty(0))

    model, streams = tiny_model(), []
    request = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": False}
    found = []
    for engine in ("cuda", "off"):
        streams.append(Tokens())
        found.append(model.generate(**padded(4, 7), **request, engine=engine, max_new_tokens=9, streamer=streams[-1]))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for name in ("scores", "logits"):
        for a, b in zip(found[0][name], found[1][name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    for a, b in zip(found[0].past_key_values.layers, found[1].past_key_values.layers, strict=True):
        torch.testing.assert_close(a.keys[1], b.keys[1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.values[1], b.values[1], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(streams[0].seen, streams[1].seen, strict=True))


def test_a_cache_of_the_caller_is_filled() -> None:
    model, ids = tiny_model(), prompt()
    cache = DynamicCache(config=model.config)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, engine="cuda")
    more = model.generate(out, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(more, model.generate(ids, max_new_tokens=10, do_sample=False))


def drawn(model: Any, seed: int, **settings: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.generate(do_sample=True, max_new_tokens=30, pad_token_id=0, engine="cuda", **settings)


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5, "top_p": 0.8}, {"min_p": 0.1, "repetition_penalty": 1.4}], ids=str
)
def test_a_seed_gives_one_text_whatever_runs_at_once(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    text = drawn(model, 1, **padded(5, 2, 9), **settings)
    assert torch.equal(drawn(model, 1, **padded(5, 2, 9), **settings), text)
    assert not torch.equal(drawn(model, 2, **padded(5, 2, 9), **settings), text)
    monkeypatch.setattr("minitron.engine.loop.BURST_SECONDS", 0)  # one step at a time
    assert torch.equal(drawn(model, 1, **padded(5, 2, 9), **settings), text)


def test_two_calls_after_one_seed_differ() -> None:
    model = tiny_model()
    first = drawn(model, 1, input_ids=prompt())
    again = model.generate(prompt(), do_sample=True, max_new_tokens=30, engine="cuda")
    assert not torch.equal(first, again)


@pytest.mark.parametrize("draft", ["lookup", "self", "another"])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.2}], ids=str)
def test_drafts_leave_the_text(draft: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    force_drafts(monkeypatch)
    model = tiny_model()
    wanted = tiny_model(num_hidden_layers=1) if draft == "another" else draft
    ids = prompt(4).repeat(1, 4)
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.6}):
        request = {"max_new_tokens": 40, "eos_token_id": 200, "engine": "cuda", **settings, **sampling}
        torch.manual_seed(0)
        plain = model.generate(ids, **request)
        torch.manual_seed(0)
        assert torch.equal(model.generate(ids, draft=wanted, **request), plain)
        report = model.last_generation
        assert (report.engine, report.speculation.tokens) == ("cuda", 40)
        assert report.speculation.drafted > 0


def test_changed_weights_are_seen() -> None:
    model, seen = tiny_model(), set()
    changes = {
        "nothing": lambda: None,
        "a matrix": lambda: model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5),
        "down_proj": lambda: model.model.layers[1].mlp.down_proj.weight.data.neg_(),
        "a norm": lambda: model.model.norm.weight.data.normal_(),
        "another tensor": lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(-model.lm_head.weight.data)),
    }
    for change in changes.values():
        change()
        ours, theirs = both(model, input_ids=prompt(), max_new_tokens=20, do_sample=False)
        assert torch.equal(ours, theirs)
        seen.add(tuple(ours[0].tolist()))
    assert len(seen) == len(changes)


def test_a_quantized_draft_is_made_anew_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    force_drafts(monkeypatch)
    model, made = tiny_model(), []
    monkeypatch.setattr(cuda_weights, "quantize", lambda *a, q=cuda_weights.quantize: made.append(1) or q(*a))
    counts, weight = [], model.model.layers[0].mlp.up_proj.weight.data
    changes = [
        lambda: None,
        lambda: None,
        lambda: weight.neg_(),
        lambda: weight.copy_(weight.flip(0)),
        lambda: weight.copy_(weight.flip(1)),
        lambda: weight[3:5, 7].copy_(weight[3:5, 7].flip(0).clone()),
    ]
    for change in changes:
        change()
        made.clear()
        model.generate(prompt(), max_new_tokens=9, do_sample=False, draft="self", engine="cuda")
        counts.append(len(made))
    assert counts[0] > 0
    assert counts[1:] == [0, *[counts[0]] * 4]


def engines_made(monkeypatch: pytest.MonkeyPatch) -> list[CudaEngine]:
    made: list[CudaEngine] = []
    start = CudaEngine.__init__
    monkeypatch.setattr(CudaEngine, "__init__", lambda self, *a, **k: made.append(self) or start(self, *a, **k))
    return made


def test_the_engine_is_kept_for_the_next_call_and_goes_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = engines_made(monkeypatch), tiny_model()
    texts = [model.generate(prompt(), max_new_tokens=n, do_sample=False, engine="cuda") for n in (9, 4, 20)]
    assert len(made) == 1
    assert torch.equal(texts[0], texts[2][:, :14])
    model.generate(prompt().repeat(3, 1), max_new_tokens=2, engine="cuda")
    assert len(made) == 2
    gone = [weakref.ref(one) for one in made]
    made.clear()
    gc.disable()
    try:
        del model
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_threads_that_generate_at_once_have_engines_of_their_own() -> None:
    model = tiny_model()
    expected = [model.generate(prompt(seed=n), max_new_tokens=25, do_sample=False) for n in range(4)]
    found: list[Any] = [None] * 4

    def run(n: int) -> None:
        found[n] = model.generate(prompt(seed=n), max_new_tokens=25, do_sample=False, engine="cuda")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny_model()
    model.model.layers[0].self_attn.o_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"of model\.layers\.0\.self_attn\.o_proj\.weight are NaN"):
        model.generate(prompt(), max_new_tokens=4, do_sample=False, engine="cuda")


def test_weights_on_two_devices_are_left_to_transformers() -> None:
    model = tiny_model()
    expected = model.generate(prompt(), max_new_tokens=4, do_sample=False, engine="off")
    model.model.layers[1].mlp.elsewhere = torch.nn.Parameter(torch.empty(1, device="meta"))  # which nothing reads
    report = GenerationReport()
    assert torch.equal(model.generate(prompt(), max_new_tokens=4, do_sample=False, report=report), expected)
    assert report.engine == "transformers"
    assert report.reason == "its weights are on cpu and meta, and an engine needs them on one device (device_map)"


def test_the_report_and_an_unknown_engine() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="engine is 'gpu'; it must be one of auto, cuda, off"):
        model.generate(prompt(), engine="gpu")
    model.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert model.last_generation.engine == "cpu"
    assert ENGINE_CHOICE.get() == "auto"
