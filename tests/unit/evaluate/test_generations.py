"""Texts written together are those written alone, up to their stop strings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import minitron
from minitron.evaluate import generations
from minitron.evaluate.generations import Wanted, write

PROMPTS = ["Once upon a time", "The dog", "Tom and Lily went to the park to play with a red ball. They", "A", "He said"]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return minitron.load(dtype="fp32", device="cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts in each call of `generate`."""
    rows: list[int] = []
    real = generations._texts

    def counted(*arguments: Any) -> list[str]:
        rows.append(len(arguments[-1]))
        return real(*arguments)

    monkeypatch.setattr(generations, "_texts", counted)
    return rows


def wanted(loaded: Any, room: int = 40, until: tuple[str, ...] = (".",), **settings: Any) -> list[Wanted]:
    return [Wanted(loaded.tokenizer(prompt)["input_ids"], room, until, settings) for prompt in PROMPTS]


def texts(loaded: Any, asked: list[Wanted]) -> list[str]:
    parts = write(loaded.model, loaded.tokenizer, loaded.tokenizer.eos_token_id, asked)
    found = dict(pair for part in parts for pair in part)
    assert sorted(found) == list(range(len(asked)))
    return [found[index] for index in range(len(asked))]


def test_together_as_upstream_alone(loaded: Any, calls: list[int]) -> None:
    from transformers.models.nemotron.modeling_nemotron import NemotronForCausalLM as Upstream

    upstream = Upstream.from_pretrained(minitron.bundled_model(), dtype=torch.float32)
    found = texts(loaded, wanted(loaded))
    assert calls == [5]
    for one, text in zip(wanted(loaded), found, strict=True):
        ids = torch.tensor([one.prompt])
        greedy: Any = {"max_new_tokens": one.room, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        out = upstream.generate(ids, **greedy)  # type: ignore[operator]
        whole = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.split(".")[0] == whole.split(".")[0]
        assert whole.startswith(text)
        assert "." in text or text == whole
    assert any(len(text) < 60 for text in found)  # some ended early


def test_a_token_that_ends_a_text(loaded: Any) -> None:
    """Rows that have ended are filled with the end token, which is not shown."""
    whole = texts(loaded, wanted(loaded, until=()))
    end = loaded.tokenizer(whole[0], add_special_tokens=False)["input_ids"][5]
    found = texts(loaded, wanted(loaded, until=(), eos_token_id=[end]))
    assert found != whole
    for text, full in zip(found, whole, strict=True):
        assert full.startswith(text)


def test_texts_at_once(loaded: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [texts(loaded, [one])[0] for one in wanted(loaded)]
    asked = [*wanted(loaded), *wanted(loaded, room=7)]
    del calls[:]
    monkeypatch.setattr(generations, "MOST_TEXTS", 2)
    assert texts(loaded, asked)[:5] == alone
    assert calls == [2, 2, 1, 2, 2, 1]  # each group has one room
    del calls[:]
    monkeypatch.setattr(generations, "CACHE_BYTES", 1)
    assert [x.split(".")[0] for x in texts(loaded, asked)[:5]] == [x.split(".")[0] for x in alone]
    assert calls == [1] * 10


def test_stop_strings_of_a_checkpoint_do_not_apply(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = texts(loaded, wanted(loaded, until=()))
    monkeypatch.setattr(loaded.model.generation_config, "stop_strings", ["e"])
    assert texts(loaded, wanted(loaded, until=())) == plain


def test_drawn_texts_have_seeds_of_their_own(loaded: Any, calls: list[int]) -> None:
    asked = [replace(one, seed=index) for index, one in enumerate(wanted(loaded, do_sample=True, temperature=0.8))]
    first, again = texts(loaded, asked), texts(loaded, asked[::-1])[::-1]
    assert calls == [1] * 10
    assert first == again


def test_without_the_engine_one_at_a_time(loaded: Any, calls: list[int]) -> None:
    together = texts(loaded, wanted(loaded))
    hook = loaded.model.model.layers[0].register_forward_hook(lambda *_: None)  # the engine refuses hooks
    try:
        del calls[:]
        alone = texts(loaded, wanted(loaded))
    finally:
        hook.remove()
    assert calls == [1] * 5
    assert [x.split(".")[0] for x in alone] == [x.split(".")[0] for x in together]
