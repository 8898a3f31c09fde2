from __future__ import annotations

import random

import pytest

from minitron.assets import bundled_model
from minitron.serve.text_output import TextOutput
from minitron.tokenizer import load_tokenizer

TEXTS = (
    "Once upon a time there was a boy.",
    "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600\U0001f469\u200d\U0001f680 \u041c\u0438\u0440",
    "  two  spaces\n\nand lines\t",
    "a\ufffdb",
)


@pytest.fixture(scope="module")
def backend():
    return load_tokenizer(bundled_model()).backend_tokenizer


def pieces(backend, ids, before=(), stops=()):
    output = TextOutput(lambda part: backend.decode(part, skip_special_tokens=True), list(before), stops)
    found = []
    for token in ids:
        found.append(output.push(token))
        if output.stopped:
            break
    return [*found, output.finish()], output


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_up_the_text_and_never_cut_a_character(backend, text) -> None:
    ids = backend.encode(text, add_special_tokens=False).ids
    found, _ = pieces(backend, ids)
    assert "".join(found) == backend.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


def test_an_incomplete_character_comes_at_the_end(backend) -> None:
    ids = backend.encode("a\U0001f600", add_special_tokens=False).ids[:-1]
    found, _ = pieces(backend, ids)
    assert found[-1].strip("a") == "\ufffd"
    assert not any("\ufffd" in piece for piece in found[:-1])


def test_stop_strings_across_tokens_as_a_search_in_the_whole_text(backend) -> None:
    chance = random.Random(0)
    text = "abab abcab ab. There was a boy, and there was a girl, and there was a dog."
    ids = backend.encode(text, add_special_tokens=False).ids
    for _ in range(300):
        stops = [text[(at := chance.randrange(len(text) - 6)) : at + chance.randint(1, 6)] for _ in range(2)]
        stops.append("abx")
        found, output = pieces(backend, ids, stops=stops)
        first = next(end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops))
        longest = max(len(stop) for stop in stops if text[:first].endswith(stop))
        assert "".join(found) == text[: first - longest], stops
        assert output.stopped


def test_what_may_become_a_stop_string_is_held_and_then_given(backend) -> None:
    text = "one two thr"
    ids = backend.encode(text, add_special_tokens=False).ids
    found, output = pieces(backend, ids, stops=["three"])
    assert not "".join(found[:-1]).endswith("t")
    assert "".join(found) == text
    assert not output.stopped


def test_the_prompt_gives_no_text_but_a_context(backend) -> None:
    before = backend.encode("Once upon a time", add_special_tokens=False).ids
    ids = backend.encode(" there was", add_special_tokens=False).ids
    found, _ = pieces(backend, ids, before)
    assert "".join(found) == " there was"
