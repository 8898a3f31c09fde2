"""Stop strings against a search of the whole text after each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minitron
from minitron.stop_texts import StopTexts
from minitron.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(minitron.bundled_model())


def end_of(tokenizer: Any, ids: list[int], begin: int, stops: list[str], every: int = 1) -> int | None:
    """The length at which the criterion ends the text."""
    criterion = StopTexts(tokenizer, stops, begin, every)
    for length in range(begin + 1, len(ids) + 1):
        if bool(criterion(torch.tensor([ids[:length]]))[0]):
            return length
    return None


@given(data=st.data())
def test_ends_with_the_token_that_completes_the_string(tokenizer: Any, data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from("ab \n.,é世😀"), min_size=1, max_size=40))
    at = data.draw(st.integers(0, len(text) - 1))
    stop = text[at : at + data.draw(st.integers(1, 6))]
    new = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = tokenizer(data.draw(st.sampled_from(["The cat ", stop, stop[:1]])))["input_ids"]
    every = data.draw(st.integers(1, 5))
    ends = [n for n in range(1, len(new) + 1) if stop in tokenizer.decode(new[:n])]
    first = next((len(prompt) + n for n in range(every, len(new) + 1, every) if n >= min(ends, default=99)), None)
    assert end_of(tokenizer, prompt + new, len(prompt), [stop], every) == first


def test_rows_are_apart_and_special_tokens_are_texts(tokenizer: Any) -> None:
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one. two", "one, two"))
    size = min(len(a), len(b))
    criterion = StopTexts(tokenizer, ["</s>", "."], 0)
    found = criterion(torch.tensor([a[:size], b[:size], [*b[: size - 1], tokenizer.eos_token_id]]))
    assert found.tolist() == [True, False, True]


def test_without_strings_nothing_ends(tokenizer: Any) -> None:
    assert not StopTexts(tokenizer, [], 0)(torch.tensor([[5, 6, 7]])).any()
