"""Settings, checks of the prompt, and the stream of text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from text_checkpoint import make_text_checkpoint

import minitron
from minitron.loading import Loaded, pick_device
from minitron.text_stream import SamplingParameters, TextStream, context_room, encode_prompt


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return minitron.load(make_text_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"), dtype="fp32")


def test_greedy_stream_is_what_generate_returns(loaded: Loaded) -> None:
    ids = encode_prompt(loaded.tokenizer, "the cat")
    stream = TextStream(loaded.model, loaded.tokenizer, ids, SamplingParameters(max_new_tokens=12, temperature=0))
    text = "".join(stream)
    expected = loaded.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert text == stream.text == loaded.tokenizer.decode(expected[0, len(ids) :], skip_special_tokens=True)
    assert stream.summary is not None
    assert stream.summary.prompt_tokens == len(ids)
    assert stream.summary.new_tokens == expected.shape[1] - len(ids)


def test_same_seed_same_text(loaded: Loaded) -> None:
    ids = encode_prompt(loaded.tokenizer, "the dog")
    texts = [
        "".join(TextStream(loaded.model, loaded.tokenizer, ids, SamplingParameters(8, seed=s))) for s in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_generation_ends_at_the_context(loaded: Loaded) -> None:
    ids = [7] * 60
    stream = TextStream(loaded.model, loaded.tokenizer, ids, SamplingParameters(100, temperature=0))
    list(stream)
    assert stream.summary is not None
    assert stream.summary.new_tokens <= 4


def test_leaving_the_block_stops_the_thread(loaded: Loaded) -> None:
    ids = encode_prompt(loaded.tokenizer, "the cat")
    with TextStream(loaded.model, loaded.tokenizer, ids, SamplingParameters(50)) as stream:
        pass
    assert not stream._thread.is_alive()


def test_an_error_in_the_thread_reaches_the_reader(loaded: Loaded) -> None:
    stream = TextStream(loaded.model, loaded.tokenizer, [1, 10_000], SamplingParameters(3))
    with pytest.raises(ValueError, match="input_ids contains 10000"):
        list(stream)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 2.0), ("top_k", -1)],
)
def test_impossible_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParameters(**{field: value})


def test_context_room() -> None:
    assert context_room(10, 64) == 54
    with pytest.raises(ValueError, match="64 tokens; the model's context"):
        context_room(64, 64)


def test_empty_prompt_is_refused(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_prompt(loaded.tokenizer, " \n")


def test_load_honours_dtype_and_device(tmp_path: Path) -> None:
    folder = make_text_checkpoint(tmp_path / "c")
    model, _ = minitron.load(folder, dtype="bf16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not model.training
    with pytest.raises(ValueError, match="'nowhere' cannot be used"):
        pick_device("nowhere")


def test_stop_strings_end_the_text(loaded: Loaded) -> None:
    ids = encode_prompt(loaded.tokenizer, "the cat")

    def text(seed: int, *stop: str) -> tuple[str, TextStream]:
        stream = TextStream(loaded.model, loaded.tokenizer, ids, SamplingParameters(20, seed=seed, stop=stop))
        return "".join(stream), stream

    # Random weights write odd bytes too: take the first text with a letter in its first half.
    texts = {seed: text(seed)[0] for seed in range(20)}
    seed, whole = next((n, t) for n, t in texts.items() if any(c.isalpha() for c in t[: len(t) // 2]))
    stop = next(c for c in whole if c.isalpha())
    short, stream = text(seed, stop)
    assert stop in short
    assert len(short) < len(whole)
    assert whole.startswith(short)
    assert stream.summary is not None
    assert stream.summary.engine in ("cpu", "reference")
    assert 0 < stream.summary.zero_fraction < 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="empty string"):
        SamplingParameters(stop=("",))
