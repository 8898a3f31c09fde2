"""Loading the tokenizer of a checkpoint, and checking that it belongs to it."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .assets import chat_template, heldout_text
from .chat import SYSTEM_MARK, TURN_MARK
from .files.links import require_own_files

# Spaces, case, digits, accents in both forms, other scripts, code: what tokenizers split in different ways.
_PROBE = (
    "The  cat's 3rd na\u00efve caf\u00e9, cafe\u0301 \u4f60\u597d \u041c\u0438\u0440 1234567\n\tdef f(x): return x**2",
    " leading and trailing ",
    "\r\n\u00a0\ufb01\u2003\U0001f600",
    "\u201cquoted\u201d \u2014 it\u2019s \uff21 \u200b\u200d\ufeff\x07 \u0130I\u0131 --- ''",
)
_SHOWN_CHARACTERS = 60
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_tokenizer(
    path: str | Path, vocab_size: int | None = None, template: bool = True, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or repository, whatever Hugging Face tokenizer it is.

    Args:
        path: folder, or repository id.
        vocab_size: rows of the model's embedding; a tokenizer with more ids is refused.
        template: add the Nemotron-Mini chat template to a tokenizer that has its special tokens but no template.
        **kwargs: passed to `AutoTokenizer.from_pretrained`.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
        ValueError: the tokenizer cannot be read, does not fit the vocabulary, or has a file that links outside the
            folder.
    """
    folder = Path(path)
    require_own_files(folder, below=("additional_chat_templates",))
    if folder.is_dir() and not any((folder / name).is_file() for name in _FILES):
        raise FileNotFoundError(f"{folder}: no tokenizer; expected one of {', '.join(_FILES)}")
    # If unset, transformers asks on the terminal, and waits, where tokenizer_config.json names code.
    kwargs.setdefault("trust_remote_code", False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), **kwargs)
    except Exception as error:  # the readers raise all kinds of exceptions and name no file
        raise ValueError(f"{path}: the tokenizer cannot be read: {error}") from error
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=-1)
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {highest}; the model's vocab_size is {vocab_size}, "
            f"so ids must be below that"
        )
    if template and tokenizer.chat_template is None and SYSTEM_MARK in vocabulary and TURN_MARK in vocabulary:
        tokenizer.chat_template = chat_template()
    return tokenizer


def tokenizer_difference(
    first: Any, second: Any, texts: Iterable[str] = (), names: tuple[str, str] = ("the first", "the second")
) -> str | None:
    """How two tokenizers differ; None if they are interchangeable.

    The vocabulary, the special tokens around a text and the ids of texts must be the same. Two tokenizers with the same
    rules in their files agree on every text. Others are compared on sample texts (lines of many kinds, passages of
    English books, `texts`) and on the text of each token.

    Args:
        first, second: tokenizers as from `load_tokenizer`.
        texts: further texts whose ids must be the same.
        names: names of the two for the returned clause.

    Returns:
        A clause such as "token 'a' is 5 in the first and None in the second".
    """
    ours, theirs = first.get_vocab(), second.get_vocab()
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differing:
        token = differing[0]
        return f"token {token!r} is {ours.get(token)} in {names[0]} and {theirs.get(token)} in {names[1]}"
    for name in ("bos_token_id", "eos_token_id"):
        mine, other = getattr(first, name), getattr(second, name)
        if mine != other:
            return f"{name} is {mine} in {names[0]} and {other} in {names[1]}"
    rules = _rules(first)
    if rules is not None and rules == _rules(second):
        return None
    for text in _differently_cut(first, second, [*_PROBE, *_passages(), *texts, *_texts_of_tokens(first, ours)]):
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
        return f"they have the same vocabulary and split {shown!r} into different tokens"
    return None


def _rules(tokenizer: Any) -> dict[str, Any] | None:
    """The rules that map a text without added special tokens to ids; None if the tokenizer does not state them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    whole = json.loads(backend.to_str())
    return {name: whole.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}


def _passages() -> list[str]:
    with lzma.open(heldout_text(), "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _texts_of_tokens(tokenizer: Any, vocabulary: dict[str, int]) -> list[str]:
    return [tokenizer.decode([index]) for index in sorted(vocabulary.values())]


def _differently_cut(first: Any, second: Any, texts: Sequence[str]) -> Iterable[str]:
    options: dict[str, Any] = {"add_special_tokens": False}
    pairs = zip(first(texts, **options).input_ids, second(texts, **options).input_ids, strict=True)
    return (text for text, (ours, theirs) in zip(texts, pairs, strict=True) if ours != theirs)
