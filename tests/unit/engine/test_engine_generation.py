"""`generate` with the engine against transformers' own path, and what the engine leaves to it."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_models import VARIANTS, some_tokens, tiny_model
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from minitron import NemotronForCausalLM
from minitron.engine import engines, model_weights
from minitron.engine_hook import GenerationReport


def prompt(count: int = 5, seed: int = 3) -> torch.Tensor:
    return torch.tensor([some_tokens(count, seed=seed)])


def both(model: NemotronForCausalLM, ids: torch.Tensor, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    ours = model.generate(ids, **settings)
    assert model.last_generation is not None
    assert model.last_generation.engine == "cpu", model.last_generation.reason
    theirs = model.generate(ids, engine="off", **settings)
    assert model.last_generation.engine == "transformers"
    return ours, theirs


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "odd widths"])
def test_greedy_tokens_are_those_of_transformers(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    for seed in range(5):
        ours, theirs = both(model, prompt(3 + 4 * seed, seed), max_new_tokens=25, do_sample=False)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 9, "eos_token_id": 3},
        {"eos_token_id": list(range(10))},
        {"max_new_tokens": 30, "bad_words_ids": [[5], [7, 8]], "no_repeat_ngram_size": 2},
        {"max_length": 12},
        {},
    ],
    ids=str,
)
def test_settings_mean_the_same(settings: dict) -> None:
    model = tiny_model()
    for seed in range(4):
        ours, theirs = both(model, prompt(seed=seed), do_sample=False, **settings)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 8},
        {"top_p": 0.8, "top_k": 0},
        {"min_p": 0.05, "top_k": 0, "repetition_penalty": 1.2},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"typical_p": 0.9},
    ],
    ids=str,
)
def test_the_same_seed_draws_the_tokens_of_transformers(settings: dict) -> None:
    model = tiny_model()
    texts = []
    for seed in (1, 2, 3):
        for engine in ("auto", "off"):
            torch.manual_seed(seed)
            out = model.generate(prompt(), max_new_tokens=20, do_sample=True, engine=engine, **settings)
            texts.append(tuple(out[0].tolist()))
            assert model.last_generation.engine == ("cpu" if engine == "auto" else "transformers")
    assert texts[::2] == texts[1::2]
    assert len(set(texts)) == 3


class Silence(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 10:] = -torch.inf
        return scores


class AfterSeven(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= 7])


@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_and_criteria_of_the_caller(do_sample: bool) -> None:
    model = tiny_model()
    ours, theirs = both(
        model,
        prompt(),
        max_new_tokens=9,
        do_sample=do_sample,
        logits_processor=LogitsProcessorList([Silence()]),
        stopping_criteria=StoppingCriteriaList([AfterSeven()]),
    )
    assert ours.shape == theirs.shape == (1, 7)
    assert (ours[0, 5:] < 10).all()
    assert do_sample or torch.equal(ours, theirs)


class Bias(LogitsProcessor):
    """Depends on the text: no token twice in a row."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 1.7, "top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2, "temperature": 2.0},
        {"top_k": 1},
        {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.4},
        {"typical_p": 0.7, "top_p": 0.9},  # the engine's draws know one of the two
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [Silence, Bias])
def test_draws_after_a_processor_of_the_caller_are_those_of_transformers(own: type, settings: dict) -> None:
    model = tiny_model()
    options = {"max_new_tokens": 30, "do_sample": True, "logits_processor": LogitsProcessorList([own()])}
    options = {"top_k": 0, **options, **settings}
    for ids in (prompt(), prompt(seed=4).repeat(3, 1)):
        for seed in range(4):
            torch.manual_seed(seed)
            ours = model.generate(ids, **options)
            assert model.last_generation is not None
            assert model.last_generation.engine == "cpu", model.last_generation.reason
            state = torch.get_rng_state()
            torch.manual_seed(seed)
            theirs = model.generate(ids, engine="off", **options)
            assert torch.equal(ours, theirs)
            assert torch.equal(state, torch.get_rng_state())


class Collect:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming() -> None:
    model, streamer = tiny_model(), Collect()
    out = model.generate(prompt(), max_new_tokens=9, do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        (lambda m: m, {"num_beams": 2}, None),
        (lambda m: m, {"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
        (lambda m: m, {"use_cache": False}, "a cache of the caller's choice"),
        (lambda m: m.train(), {}, "training"),
        (lambda m: m.double(), {}, "float64"),
        (lambda m: m.model.norm.register_forward_hook(lambda *_: None), {}, "a hook on NemotronLayerNorm1P"),
        (lambda m: setattr(m, "forward", m.forward), {}, "forward of a NemotronForCausalLM was replaced"),
    ],
)
def test_what_is_left_to_transformers(change, settings: dict, reason: str | None) -> None:
    model = tiny_model()
    change(model)
    model.generate(prompt(), max_new_tokens=3, do_sample=False, **settings)
    if reason is None:  # another decoding method of transformers never asks the engine
        assert model.last_generation is None
    else:
        assert model.last_generation.engine == "transformers"
        assert reason in model.last_generation.reason


def test_other_activations_and_masks_are_left_to_transformers() -> None:
    model = tiny_model(hidden_act="gelu")
    model.generate(prompt(), max_new_tokens=2)
    assert "hidden_act is 'gelu'" in model.last_generation.reason
    model = tiny_model()
    for mask in ([1, 0, 1, 1, 1], [1, 1, 1, 1, 0]):
        model.generate(prompt(), attention_mask=torch.tensor([mask]), max_new_tokens=2)
        assert model.last_generation.engine == "transformers"
    shifted = torch.arange(5)[None] + 3
    model.generate(prompt(), position_ids=shifted, max_new_tokens=2)
    assert model.last_generation.reason == "positions of the caller's choice"


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="engine is 'fast'"):
        tiny_model().generate(prompt(), engine="fast")


@pytest.mark.parametrize("how", ["in place", "through data", "load_state_dict", "gain"])
def test_changed_weights_are_packed_again(how: str) -> None:
    model = tiny_model()
    model.generate(prompt(), max_new_tokens=2)
    down = model.model.layers[0].mlp.down_proj.weight
    if how == "in place":
        with torch.no_grad():
            down.neg_()
    elif how == "through data":
        down.data.mul_(-1)
    elif how == "load_state_dict":
        model.load_state_dict({name: -value for name, value in model.state_dict().items()})
    else:
        model.model.norm.weight.data[3] += 2.0
    ours, theirs = both(model, prompt(), max_new_tokens=15, do_sample=False)
    assert torch.equal(ours, theirs)


def test_packed_weights_go_with_the_model() -> None:
    import gc

    model = tiny_model()
    model.generate(prompt(), max_new_tokens=2)
    assert model in model_weights._copies
    count = len(model_weights._copies)
    del model
    gc.collect()
    assert len(model_weights._copies) < count


def test_an_error_in_the_loop_ends_the_threads() -> None:
    class Fails(StoppingCriteria):
        def __call__(self, *_: object, **__: object) -> torch.Tensor:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        tiny_model().generate(prompt(), max_new_tokens=5, stopping_criteria=StoppingCriteriaList([Fails()]))
    assert threading.active_count() == before


def test_without_numba_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    model = tiny_model()
    ours = model.generate(prompt(), max_new_tokens=8, do_sample=False)
    assert model.last_generation.engine == "reference"
    assert torch.equal(ours, model.generate(prompt(), max_new_tokens=8, do_sample=False, engine="off"))


def test_the_zero_fraction_is_reported() -> None:
    model = tiny_model()
    model.generate(prompt(), max_new_tokens=8, do_sample=False)
    report = model.last_generation
    assert report.seen_neurons == 8 * 2 * 96
    assert 0 < report.zero_fraction < 1


def test_generations_at_the_same_time_do_not_meet() -> None:
    model = tiny_model()
    settings = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=None)
    expected = [model.generate(prompt(seed=i), generation_config=settings, engine="off") for i in range(4)]
    found: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        found[i] = model.generate(prompt(seed=i), generation_config=settings)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


class Meeting(BaseStreamer):
    """Lets two calls of `generate` wait for each other after their first token."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier, self.tokens = barrier, 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens == 2:  # the prompt was the first
            self.barrier.wait(timeout=60)

    def end(self) -> None:
        pass


def test_each_call_has_a_report_of_its_own_when_two_threads_generate() -> None:
    model, ids = tiny_model(), torch.tensor([some_tokens(6)])
    barrier, reports = threading.Barrier(2), {"auto": GenerationReport(), "off": GenerationReport()}

    def call(engine: str) -> None:
        how = {"max_new_tokens": 8, "do_sample": False, "report": reports[engine], "streamer": Meeting(barrier)}
        model.generate(ids, engine=engine, **how)

    threads = [threading.Thread(target=call, args=(engine,)) for engine in reports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reports["auto"].engine == "cpu"
    assert reports["auto"].seen_neurons > 0
    assert (reports["off"].engine, reports["off"].reason) == ("transformers", 'engine="off"')
    assert reports["off"].zero_fraction is None
    assert model.last_generation in (reports["auto"], reports["off"])


def test_a_report_says_what_ran_in_the_call_it_was_handed_to() -> None:
    model, ids, report = tiny_model(), torch.tensor([some_tokens(6)]), GenerationReport()
    model.generate(ids, max_new_tokens=3, do_sample=False, draft="lookup", report=report)
    assert report.engine == "cpu"
    assert report.speculation is not None
    assert model.last_generation is report
    model.generate(ids, max_new_tokens=3, do_sample=False, num_beams=2, report=report)
    assert report == GenerationReport("transformers")
    assert model.last_generation is None
