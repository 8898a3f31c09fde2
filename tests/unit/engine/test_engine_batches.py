"""Batches of prompts of different lengths: the texts, draws and outputs of transformers' own path."""

from __future__ import annotations

import pytest
import torch
from engine_models import some_tokens, tiny_model
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from minitron import NemotronCache, NemotronForCausalLM
from minitron.engine import engines

LENGTHS = (3, 11, 1, 20, 7)


def batch(lengths: tuple[int, ...] = LENGTHS, pad: int = 0) -> dict[str, torch.Tensor]:
    rows, longest = [some_tokens(n, seed=n) for n in lengths], max(lengths)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    return {"input_ids": ids, "attention_mask": mask}


def both(model: NemotronForCausalLM, request: dict, **settings: object) -> tuple:
    found = []
    for engine in ("auto", "off"):
        torch.manual_seed(5)
        found.append(model.generate(**request, engine=engine, pad_token_id=0, **settings))
        assert model.last_generation.engine == ("cpu" if engine == "auto" else "transformers")
    return tuple(found)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "eos_token_id": list(range(12))},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": False, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]]},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_k": 7},
        {"do_sample": True, "top_p": 0.8, "top_k": 0},
        {"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.2, "eos_token_id": [3, 4, 5, 6]},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_a_batch_is_that_of_transformers(settings: dict) -> None:
    model = tiny_model()
    ours, theirs = both(model, batch(), max_new_tokens=25, **settings)
    assert torch.equal(ours, theirs)


def test_each_text_is_that_of_its_prompt_alone() -> None:
    model, request = tiny_model(torch.bfloat16), batch()
    together = model.generate(**request, max_new_tokens=20, do_sample=False, pad_token_id=0)
    for row, n in zip(together, LENGTHS, strict=True):
        alone = model.generate(torch.tensor([some_tokens(n, seed=n)]), max_new_tokens=20, do_sample=False)
        assert torch.equal(row[max(LENGTHS) - n :], alone[0])


@pytest.mark.parametrize("count", [8, 9, 19])
def test_many_prompts(count: int) -> None:
    model = tiny_model()
    request = batch(tuple(1 + (5 * i) % 13 for i in range(count)))
    ours, theirs = both(model, request, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ends", [[3], list(range(0, 96, 5))], ids=["few end", "many end"])
@pytest.mark.parametrize("count", [5, 19])
def test_greedy_texts_end_at_different_places(count: int, ends: list[int]) -> None:
    model = tiny_model()
    request = batch(tuple(1 + (5 * i) % 13 for i in range(count)))
    streams: list[list[torch.Tensor]] = []
    for engine in ("auto", "off"):
        streamer = Tokens()
        settings = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
        texts = model.generate(**request, engine=engine, streamer=streamer, **settings)
        streams.append([*streamer.seen, texts])
    assert len(streams[0]) == len(streams[1])
    assert all(torch.equal(a, b) for a, b in zip(*streams, strict=True))


class Tokens(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None:
        pass


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_cache_of_a_batch_has_all_places(do_sample: bool) -> None:
    model, request = tiny_model(), batch()
    caches = []
    for engine in ("auto", "off"):
        torch.manual_seed(3)
        caches.append(DynamicCache(config=model.config))
        model.generate(
            **request, past_key_values=caches[-1], engine=engine, max_new_tokens=30, do_sample=do_sample,
            pad_token_id=0, eos_token_id=list(range(0, 96, 7)),
        )  # fmt: skip
    first = [int((~mask.bool()).sum()) for mask in request["attention_mask"]]
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
        for row, start in enumerate(first):
            torch.testing.assert_close(ours.keys[row, :, start:], theirs.keys[row, :, start:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_logits_and_the_cache_are_returned(do_sample: bool) -> None:
    model, request = tiny_model(), batch()
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ours, theirs = both(
        model, request, max_new_tokens=12, do_sample=do_sample, top_k=20, eos_token_id=list(range(9)), **asked
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(theirs.scores)
    for name in ("scores", "logits"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert type(ours.past_key_values) is type(theirs.past_key_values)
    ours_kv, theirs_kv = ours.past_key_values.layers, theirs.past_key_values.layers
    seen = request["attention_mask"].bool()
    for a, b in zip(ours_kv, theirs_kv, strict=True):
        assert a.keys.shape == b.keys.shape
        for row, mask in enumerate(seen):
            start = int((~mask).sum())
            torch.testing.assert_close(a.keys[row, :, start:], b.keys[row, :, start:], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(a.values[row, :, start:], b.values[row, :, start:], atol=1e-4, rtol=1e-4)


def test_a_cache_of_the_caller_is_filled() -> None:
    model, ids = tiny_model(), torch.tensor([some_tokens(6)])
    for cache in (DynamicCache(config=model.config), NemotronCache(config=model.config)):
        out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert model.last_generation.engine == "cpu"
        assert cache.get_seq_length() == 10
        more = model.generate(out, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert torch.equal(more, model.generate(ids, max_new_tokens=10, do_sample=False))


def test_the_reference_serves_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    model = tiny_model()
    ours = model.generate(**batch(), max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert model.last_generation.engine == "reference"
    theirs = model.generate(**batch(), max_new_tokens=9, do_sample=False, pad_token_id=0, engine="off")
    assert torch.equal(ours, theirs)
