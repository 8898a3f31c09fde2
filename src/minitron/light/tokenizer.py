"""A checkpoint's fast tokenizer without transformers, and the pieces of text that a reader sees as tokens come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.limits import (
    MAX_JSON_BYTES,
    MAX_TOKENIZER_BYTES,
    MAX_TOKENIZER_JSON_MEMORY,
    CheckpointError,
    json_memory,
    read_json,
    read_small_file,
)
from .settings import NotServedError, refuse_unless

_SETTINGS = {
    "backend",
    "is_local",
    "local_files_only",
    "tokenizer_class",
    "clean_up_tokenization_spaces",
    "model_max_length",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "additional_special_tokens",
    "extra_special_tokens",
}
"""Keys of tokenizer_config.json that change neither ids nor text once the checks of `_check_settings` hold."""
_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""transformers' names for a tokenizer that is tokenizer.json and nothing more."""
_OTHER_FILES = ("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt")


class LightTokenizer:
    """Ids of a text and text of ids, as transformers' fast tokenizer of the same folder gives them."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """Read tokenizer.json.

        Raises:
            NotServedError: the folder has a tokenizer of another kind, or one that does not fit the vocabulary.
        """
        from tokenizers import Tokenizer

        others = [name for name in _OTHER_FILES if (folder / name).exists()]
        refuse_unless(not others, f"{others[:1]} beside tokenizer.json")
        try:
            data = read_small_file(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
            settings = read_json(folder / "tokenizer_config.json", MAX_JSON_BYTES)
        except CheckpointError as error:
            raise NotServedError(str(error)) from None
        refuse_unless(json_memory(data) <= MAX_TOKENIZER_JSON_MEMORY, "a tokenizer.json that takes too much memory")
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # its exceptions have no class of their own
            raise NotServedError(str(error)) from None
        _check_settings(settings, self._tokenizer)
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        refuse_unless(highest < vocab_size, "a tokenizer with more ids than the model")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer puts around it."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _check_settings(settings: dict[str, Any], tokenizer: Any) -> None:
    unknown = sorted(settings.keys() - _SETTINGS)
    refuse_unless(not unknown, f"tokenizer_config.json has {unknown[:1]}")
    refuse_unless(settings.get("backend", "tokenizers") == "tokenizers", "another backend")
    refuse_unless(settings.get("tokenizer_class") in _CLASSES, "a tokenizer_class of its own")
    refuse_unless(settings.get("clean_up_tokenization_spaces", False) is False, "spaces that are cleaned up")
    refuse_unless(tokenizer.truncation is None and tokenizer.padding is None, "texts of a fixed length")
    named = [settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token") if settings.get(name)]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(name) or []
        refuse_unless(isinstance(more, list), f"{name} of another kind")
        named += more
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    # A name that is not special in tokenizer.json would be made so by transformers, or get an id of its own.
    refuse_unless(all(isinstance(token, str) and token in special for token in named), "special tokens of its own")


class Pieces:
    """Turns tokens into pieces of text that will not change any more: up to the last space, or up to a line's end.

    The pieces are those of transformers' `TextStreamer`, joined: a word is held back until it is complete.
    """

    def __init__(self, tokenizer: LightTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def put(self, ids: list[int]) -> str:
        """What has become certain with these tokens."""
        return "".join(self._next(token) for token in ids)

    def _next(self, token: int) -> str:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\n"):
            piece = text[self._shown :]
            self._ids, self._shown = [], 0
            return piece
        stop = len(text) if text and _is_ideograph(text[-1]) else text.rfind(" ") + 1
        piece = text[self._shown : stop]
        self._shown += len(piece)
        return piece

    def end(self) -> str:
        """What is left after the last token."""
        text = self._tokenizer.decode(self._ids) if self._ids else ""
        piece = text[self._shown :]
        self._ids, self._shown = [], 0
        return piece


_IDEOGRAPHS = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F)),
    *((0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)
"""Blocks of Chinese characters, which are words of their own."""


def _is_ideograph(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _IDEOGRAPHS)
