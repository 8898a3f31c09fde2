"""The bytes of single tokens, for log probabilities: a token may be a part of a character."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from .served import ServedModel
from .token_choice import TokenLogprobs

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


class TokenTexts:
    """Bytes and text of the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = "" if backend is None else json.dumps(json.loads(backend.to_str()).get("decoder"))
        self._byte_level = "ByteLevel" in decoder
        self._added = set(tokenizer.get_added_vocab().values())
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        if token not in self._known:
            self._known[token] = self._bytes(token)
        return self._known[token]

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._added:
            return piece.encode()
        if self._byte_level:
            table = _byte_of_character()
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return piece.encode()
        found = _BYTE.fullmatch(piece)
        return bytes([int(found[1], 16)]) if found else piece.replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        """The text that a token stands for; parts of characters are U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")

    def chat_logprobs(self, found: list[TokenLogprobs]) -> dict[str, Any]:
        """The `logprobs` object of a chat choice."""
        content = [
            {
                **self._entry(one.token, one.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in one.top],
            }
            for one in found
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text_of(token), "logprob": finite(logprob), "bytes": list(self.bytes_of(token))}

    def completion_logprobs(self, found: list[TokenLogprobs | None], tokens: list[int], offset: int) -> dict[str, Any]:
        """The `logprobs` object of a text completion; the first token of a prompt has none."""
        texts = [self.text_of(token) for token in tokens]
        offsets = [offset + sum(map(len, texts[:index])) for index in range(len(texts))]
        tops = [None if one is None else {self.text_of(t): finite(p) for t, p in one.top} for one in found]
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else finite(one.logprob) for one in found],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def finite(logprob: float) -> float:
    """A log probability that JSON can hold: -9999 for one of probability 0, as OpenAI writes it."""
    return max(logprob, -9999.0)


_texts: WeakKeyDictionary[ServedModel, TokenTexts] = WeakKeyDictionary()


def token_texts(model: ServedModel) -> TokenTexts:
    """The token texts of a served model, made when they are first needed."""
    if model not in _texts:
        _texts[model] = TokenTexts(model.tokenizer)
    return _texts[model]
