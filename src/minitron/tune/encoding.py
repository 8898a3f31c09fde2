"""Texts, pairs of texts and messages as the token ids that a classifier reads, alike in training and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from ..templates import render_conversation
from .pairs import encode_replies

Encoder: TypeAlias = Callable[[Any, Sequence[tuple[str, str | None]], int], list[list[int]]]
"""(tokenizer, texts or pairs of texts, most tokens) -> token ids of each."""
PLACEHOLDER = "MESSAGE OF THE USER"
SEPARATOR = "pair_separator"
"""Field of a classifier's `config.json`: the text between the two texts of a pair; absent where the tokenizer itself
puts tokens between them, and in models that were trained before it existed."""

REPLIES = {True: "reply-messages", False: "reply-texts"}
"""`text_format` of a reward model, by whether it learned from messages."""


class LabelError(ValueError):
    """Labels or texts that cannot be learned or compared."""


def encode_texts(
    tokenizer: Any, texts: Sequence[tuple[str, str | None]], most: int, separator: str | None = None
) -> list[list[int]]:
    """Token ids of texts or pairs of texts; longer ones are cut at their end.

    Both texts of a pair are cut, the longer one first.

    Args:
        tokenizer: of the model.
        texts: (text, second text or None).
        most: tokens of the result.
        separator: stands between the texts of a pair; None leaves that to the tokenizer.

    Raises:
        LabelError: `most` leaves no room for a token of each text.
    """
    pairs = any(pair for _, pair in texts)
    if separator is not None and pairs:
        return _separated(tokenizer, texts, most, separator)
    first = [text for text, _ in texts]
    second = [pair or "" for _, pair in texts] if pairs else None
    encoded = tokenizer(first, second, truncation=True, max_length=most)["input_ids"]
    return [list(ids) for ids in encoded]


def is_padding(tokenizer: Any, text: str) -> bool:
    """Whether a text is nothing but the tokenizer's padding token, which a classifier takes for no token."""
    pad = getattr(tokenizer, "pad_token", None)
    return bool(pad) and pad in text and not text.replace(pad, " ").strip()


def pair_separator(tokenizer: Any) -> str | None:
    """What must stand between the texts of a pair; None where the tokenizer itself puts a token between them.

    The tokenizer's separator token, else its end-of-text token, else a line end. Without it ("ab", "c") and ("a", "bc")
    would be the same tokens.
    """
    alone, whole = len(_plain(tokenizer, "b")), len(tokenizer("a", "b")["input_ids"])
    if whole > len(tokenizer("a")["input_ids"]) + alone:
        return None
    tokens = (getattr(tokenizer, name, None) for name in ("sep_token", "eos_token"))
    return next((token for token in tokens if token and len(_plain(tokenizer, token)) == 1), "\n")


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _separated(tokenizer: Any, texts: Sequence[tuple[str, str | None]], most: int, separator: str) -> list[list[int]]:
    before, after = special_ends(tokenizer)
    between = _plain(tokenizer, separator)
    first, second = (
        tokenizer([each or "" for each in side], add_special_tokens=False, verbose=False)["input_ids"]
        for side in zip(*texts, strict=True)
    )
    room = most - len(before) - len(between) - len(after)
    if room < 2:
        raise LabelError(f"{most} tokens leave no room for two texts; the tokens around them are {most - room}")
    encoded = []
    for one, two in zip(first, second, strict=True):
        if two:
            one, two = _cut(one, two, room)
            encoded.append([*before, *one, *between, *two, *after])
        else:
            encoded.append([*before, *one[: room + len(between)], *after])
    return encoded


def _cut(one: list[int], two: list[int], room: int) -> tuple[list[int], list[int]]:
    """Two lists of at most `room` tokens together; the longer one loses what is too much, then both alike."""
    half = room // 2
    if len(two) <= half:
        return one[: room - len(two)], two
    first = one[: max(room - half, room - len(two))]
    return first, two[: room - len(first)]


def special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    first = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if first is None:
        raise LabelError("the tokenizer changes the tokens of a text when it adds special tokens")
    return list(whole[:first]), list(whole[first + len(plain) :])


def encode_turns(tokenizer: Any, texts: Sequence[tuple[str, str | None]], most: int) -> list[list[int]]:
    """Token ids of messages: each text as a user's, up to the heading of the answer; the second text, if there is one,
    as the answer. This is what a guard of `minitron serve` reads of a prompt and of an answer.

    Messages that are too long are cut at their end, the answer as well as the question.

    Raises:
        LabelError: the tokenizer has no chat template, or one that does not repeat the message.
    """
    if tokenizer.chat_template is None:
        raise LabelError("the model has no chat template, so texts cannot be rendered as messages; leave out --chat")
    rendered = render_conversation(
        tokenizer, [{"role": "user", "content": PLACEHOLDER}], tools=None, add_generation_prompt=True
    )
    head, mark, tail = rendered.partition(PLACEHOLDER)
    if not mark:
        raise LabelError("the chat template does not repeat the user's message, so --chat cannot be used")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    room = most - len(ids(head + tail)) - 2  # tokens may join differently at the two seams
    if room < 2:
        raise LabelError(f"texts may have {most} tokens, which the chat template alone takes")

    def cut(text: str, room: int) -> str:
        found = ids(text)
        return text if len(found) <= room else tokenizer.decode(found[:room], clean_up_tokenization_spaces=False)

    encoded = []
    for text, answer in texts:
        asked = cut(text.strip(), room if answer is None else room // 2)
        encoded.append(ids(head + asked + tail + ("" if answer is None else cut(answer, room // 2)))[:most])
    return encoded


def encoder_of(config: Any) -> Encoder:
    """How the texts of a saved classifier were encoded when it was trained."""
    kind = getattr(config, "text_format", "plain")
    if kind == "chat":
        return encode_turns
    if kind in REPLIES.values():
        return partial(encode_replies, messages=kind == REPLIES[True])
    return partial(encode_texts, separator=getattr(config, SEPARATOR, None))
