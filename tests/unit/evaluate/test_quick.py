"""Perplexity, distance and generation metrics against plain loops in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_checkpoint import make_text_checkpoint

import minitron
from minitron.evaluate import quick, scoring

TEXTS = [
    "the cat sat on the mat and the dog ran to the sea, and the cat ran to the dog",
    "Grüße, 世界",
    "",
    "a" * 90,
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> minitron.loading.Loaded:
    return minitron.load(make_text_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


def plain_nats(model: Any, tokenizer: Any, text: str, window: int, stride: int) -> tuple[float, int]:
    """Token after token, one forward pass each, in float64."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    wide = copy.deepcopy(model).double()
    nats = 0.0
    for target in range(1, len(ids)):
        # The window that scores this target: the first scores `window` targets, each later one `stride`.
        end = window if target <= window else window + stride * math.ceil((target - window) / stride)
        end = min(end, len(ids) - 1)
        with torch.no_grad():
            logits = wide(torch.tensor([ids[max(0, end - window) : target]])).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[target]].item()
    return nats, len(ids) - 1


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (24, 24), (24, 7)])
def test_perplexity_is_that_of_a_plain_loop(loaded: Any, window: int, stride: int) -> None:
    got = quick.perplexity(*loaded, TEXTS, window=window, stride=stride)
    expected = [plain_nats(*loaded, text, window, stride) for text in TEXTS]
    assert got.tokens == sum(count for _, count in expected)
    assert got.nats == pytest.approx(sum(nats for nats, _ in expected), rel=1e-6)
    assert got.bytes == sum(len(text.encode()) for text in TEXTS)
    assert got.bits_per_byte == pytest.approx(got.nats / math.log(2) / got.bytes)
    assert got.perplexity == pytest.approx(math.exp(got.nats / got.tokens))


@given(length=st.integers(0, 60), window=st.integers(1, 20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_token_is_scored_once_with_its_own_past(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    ids = list(range(100, 100 + length))
    seen = []
    for piece in quick.sliding_windows(ids, 99, window, stride):
        assert len(piece.ids) == len(piece.targets) <= window
        assert piece.targets == [i + 1 for i in piece.ids]
        assert len(seen) == 0 or len(piece.ids) - piece.scored >= min(window - stride, len(seen))
        seen += piece.targets[len(piece.targets) - piece.scored :]
    assert seen == ids


def test_chunks_of_logits_change_nothing(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = quick.quick_suite(*loaded, TEXTS, reference=loaded.model)
    monkeypatch.setattr(scoring, "CHUNK_VALUES", 5 * 512)
    after = quick.quick_suite(*loaded, TEXTS, reference=loaded.model)
    assert after["text"]["nats"] == pytest.approx(before["text"]["nats"], rel=1e-7)
    assert after["distance"] == pytest.approx(before["distance"], abs=1e-6)


def test_distance_to_itself_and_to_another(loaded: Any) -> None:
    model, tokenizer = loaded
    same = quick.distance(model, model, tokenizer, TEXTS)
    assert same.kl_nats_per_token == pytest.approx(0, abs=1e-7)
    assert same.top1_agreement == 1.0
    torch.manual_seed(5)
    other = type(model)(model.config).eval()
    got = quick.distance(model, other, tokenizer, TEXTS, window=32)
    kl, agree, count = 0.0, 0, 0
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for start in range(0, len(ids) - 1, 32):
            # Windows are full but for the first one of a short text: the last one begins earlier.
            end = min(start + 32, len(ids) - 1)
            inputs = torch.tensor([ids[max(0, end - 32) : end]])
            with torch.no_grad():
                p, q = (m(inputs).logits[0, -(end - start) :].double().softmax(-1) for m in (other, model))
            kl += (p * (p / q).log()).sum().item()
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += end - start
    assert got.tokens == count
    assert got.kl_nats_per_token == pytest.approx(kl / count, rel=1e-5)
    assert got.top1_agreement == agree / count
    assert got.reference_nats_per_token == pytest.approx(
        quick.perplexity(other, tokenizer, TEXTS, 32).nats_per_token, rel=1e-6
    )


def test_generation_metrics_of_a_known_continuation(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([[1, 2, 1, 2, 1, 2, 1], [5, 6, 7, 3]])
    monkeypatch.setattr(quick, "_continue", lambda *_: next(runs))
    got = quick.generation(*loaded, ["a", "b"])
    # Pairs: 12 21 12 21 12 21 | 56 67 73; fours: 1212 2121 1212 2121 | 5673. Token 3 is eos.
    assert (got.prompts, got.new_tokens) == (2, 11)
    assert got.distinct_1 == 6 / 11
    assert got.distinct_2 == 5 / 9
    assert got.repeated_4grams == 2 / 5
    assert got.ended == 1 / 2


def test_generation_is_greedy(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = quick._continue(model, tokenizer, "the cat", 8)
    seen = [tokenizer.bos_token_id, *tokenizer("the cat", add_special_tokens=False)["input_ids"]]
    for token in ids:
        assert model(torch.tensor([seen])).logits[0, -1].argmax().item() == token
        seen.append(token)


def test_what_cannot_be_scored_is_refused(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="no text to score"):
        quick.perplexity(model, tokenizer, [""])
    with pytest.raises(ValueError, match="window is 65; it must be from 1 to the model's context, 64"):
        quick.perplexity(model, tokenizer, TEXTS, window=65)
    with pytest.raises(ValueError, match="stride is 0"):
        quick.perplexity(model, tokenizer, TEXTS, stride=0)
    with pytest.raises(TypeError, match="one string"):
        quick.perplexity(model, tokenizer, "text")
    with pytest.raises(ValueError, match="no prompt"):
        quick.generation(model, tokenizer, [])
    with pytest.raises(ValueError, match="fill the model's context"):
        quick.generation(model, tokenizer, ["a b " * 100])
    other = minitron.NemotronForCausalLM(minitron.NemotronConfig(**{**model.config.to_dict(), "vocab_size": 600}))
    with pytest.raises(ValueError, match="512 and 600"):
        quick.distance(model, other, tokenizer, TEXTS)
