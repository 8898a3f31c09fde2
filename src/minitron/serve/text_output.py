"""Text from tokens, as it becomes certain: whole characters, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNKNOWN = "\ufffd"
"""What an incomplete character is decoded as."""
CONTEXT = 8
"""Tokens of the prompt before the answer: some tokenizers drop a space at the beginning of what they decode."""

Decode = Callable[[list[int]], str]


class TextOutput:
    """The text of one answer. Pieces that `push` and `finish` return make up the text without its stop string."""

    def __init__(self, decode: Decode, before: Sequence[int], stops: Sequence[str] = ()) -> None:
        """Begin an answer.

        Args:
            decode: text of token ids, without special tokens.
            before: the prompt's tokens, or its last ones.
            stops: strings that end the text and do not belong to it.
        """
        self._decode = decode
        self._ids = list(before[-CONTEXT:])
        self._known = decode(self._ids) if self._ids else ""
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come."""

    def push(self, token: int) -> str:
        """What is certain after a token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(UNKNOWN) or len(text) <= len(self._known):
            return ""  # a part of a character, or a token without text
        piece = text[len(self._known) :]
        self._ids = self._ids[-CONTEXT:]
        self._known = self._decode(self._ids)
        return self._passed(piece)

    def finish(self) -> str:
        """The rest: an incomplete character, and text that was not a stop string after all."""
        text = self._decode(self._ids)
        rest = self._passed(text[len(self._known) :]) if len(text) > len(self._known) else ""
        if not self.stopped:
            rest += self._held
            self._held = ""
        return rest

    def _passed(self, piece: str) -> str:
        """The part of the text so far that no stop string can contain."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]  # the one that is complete first, however the text is cut into tokens
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that is a beginning of the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
