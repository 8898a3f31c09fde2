"""Conversations as tokens, and which of them the assistant said: what a chat model learns.

A conversation is rendered turn by turn with the tokenizer's own chat template. The tokens of an assistant's turn are
those that the rendering with the turn has beyond the rendering that asks for it. That holds for every template whose
renderings begin with each other, whatever marks it uses; one for which it does not is refused, and the turn is shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..data.examples import Conversation, Examples
from ..data.packing import Batch, EpochOrder, best_fit, collate, random_generator
from ..ops.loss import IGNORE_INDEX
from ..templates import render_conversation


class ConversationError(ValueError):
    """A conversation that cannot be learned from; the message shows the turn."""


@dataclass(frozen=True)
class Turns:
    """A conversation as tokens."""

    ids: np.ndarray
    """(T,) int32."""
    learned: np.ndarray
    """(T,) bool: tokens of the assistant, its end-of-turn token included."""
    dropped: int = 0
    """Messages at the end that did not fit."""


def render_turns(tokenizer: Any, conversation: Conversation, most: int | None = None) -> Turns:
    """The tokens of a conversation, and which are learned.

    Args:
        tokenizer: with a chat template.
        conversation: with at least one message of the assistant.
        most: tokens that it may have. A longer one is cut after the last turn of the assistant that fits.

    Raises:
        ConversationError: the renderings do not begin with each other; the first turn of the assistant does not fit.
        ChatTemplateError: the template refuses the conversation.
    """
    ids: list[int] = []
    learned: list[bool] = []
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    kept = 0
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        asked = _tokens(tokenizer, conversation, number, True)
        said = _tokens(tokenizer, conversation, number + 1, False)
        for whole, part in ((asked, ids), (said, asked)):
            if whole[: len(part)] != part:
                raise ConversationError(
                    f"the chat template changes what stands before message {number + 1} ({_shown(message)}): "
                    f"{_difference(tokenizer, whole, part)}; so what the assistant said cannot be told from the rest"
                )
        turn = said[len(asked) :]
        # Behind the token that ends the turn some templates put a line end, which the model need not write.
        ends = next((at + 1 for at in range(len(turn) - 1, -1, -1) if turn[at] in special), len(turn))
        if most is not None and len(asked) + ends > most:
            break
        learned += [False] * (len(asked) - len(ids)) + [True] * ends + [False] * (len(turn) - ends)
        ids, kept = said, number + 1
    if not kept:
        raise ConversationError(f"its first turn of the assistant ends beyond {most} tokens")
    cut = len(ids) if most is None else most
    rest = sum(1 for message in conversation.messages[kept:] if message["role"] == "assistant")
    dropped = len(conversation.messages) - kept if rest else 0
    return Turns(np.asarray(ids[:cut], np.int32), np.asarray(learned[:cut], bool), dropped)


def _tokens(tokenizer: Any, conversation: Conversation, count: int, prompt: bool) -> list[int]:
    text = render_conversation(
        tokenizer, conversation.messages[:count], tools=conversation.tools or None, add_generation_prompt=prompt
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _difference(tokenizer: Any, whole: Sequence[int], part: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), len(whole))
    expected, found = (tokenizer.decode(list(tokens[max(0, at - 4) : at + 8])) for tokens in (part, whole))
    return f"{found!r} stands where {expected!r} was"


def _shown(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return f"{message['role']}: {content if content is not None else message.get('tool_calls')!r:.60}"[:80]


def show_learned(tokenizer: Any, turns: Turns) -> str:
    """The conversation as the model sees it, what is learned between the marks `[[` and `]]`."""
    parts: list[str] = []
    edges = np.flatnonzero(np.diff(turns.learned.astype(np.int8), prepend=0, append=0))
    first = 0
    for begin, end in edges.reshape(-1, 2).tolist():
        parts += [tokenizer.decode(turns.ids[first:begin]), "[[", tokenizer.decode(turns.ids[begin:end]), "]]"]
        first = end
    return "".join([*parts, tokenizer.decode(turns.ids[first:])])


# --- a stream of packed conversations ----------------------------------------------------------------------------


class PackedConversations:
    """Conversations packed into blocks by best fit, none cut: a `train.stream.Stream`.

    Attention stays inside each conversation, as between documents.

    Args:
        turns: the conversations as tokens.
        block: tokens of a block.
        seed: determines the order.
        digest: of the conversations, the tokenizer and its template.
    """

    def __init__(self, turns: Sequence[Turns], block: int, seed: int, digest: str) -> None:
        shuffle = random_generator(seed, 0xC4A7).permutation(len(turns))
        self._turns = [turns[i] for i in shuffle]
        self.block, self.seed = block, seed
        self._members = best_fit(np.asarray([len(t.ids) for t in self._turns]), block)
        self._digest = digest
        self.num_learned = int(sum(t.learned.sum() for t in turns))
        self._order = EpochOrder(len(self._members), seed, 0xE90C)

    def __len__(self) -> int:
        """Blocks in an epoch."""
        return len(self._members)

    @property
    def key(self) -> dict[str, Any]:
        """As of `Stream`."""
        return {"conversations": self._digest}

    @property
    def origins(self) -> list[dict[str, Any]]:
        """As of `Stream`."""
        return []

    def check(self, vocab_size: int, sequence: int) -> None:
        """As of `Stream`."""
        highest = max(int(t.ids.max()) for t in self._turns)
        if highest >= vocab_size:
            raise ValueError(f"the conversations have token id {highest}; the model's vocab_size is {vocab_size}")
        if self.block != sequence:
            raise ValueError(f"conversations are packed into {self.block} tokens; sequence is {sequence}")

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Blocks of the given numbers as one batch, whose labels are the learned tokens."""
        blocks = [[self._turns[m] for m in self._members[n]] for n in numbers]
        made = collate([[t.ids for t in block] for block in blocks], self.block)
        learned = np.zeros(made.labels.shape, bool)
        for row, block in enumerate(blocks):
            flat = np.concatenate([t.learned for t in block])
            learned[row, : len(flat)] = flat
        labels = made.labels.masked_fill(~torch.from_numpy(learned), IGNORE_INDEX)
        return replace(made, labels=labels, num_items=int((labels != IGNORE_INDEX).sum()))

    def batches(self, start: int, count: int, at_once: int, *, share: tuple[int, int] = (0, 1)) -> list[Batch]:
        """As of `Stream`: blocks in a new order in every epoch."""
        numbers = [self._order.at(start + i) for i in range(count)]
        items = sum(self._scored(n) for n in numbers)
        number, ways = share
        mine = numbers[number * count // ways : (number + 1) * count // ways]
        return [replace(self.batch(mine[i : i + at_once]), num_items=items) for i in range(0, len(mine), at_once)]

    def _scored(self, number: int) -> int:
        # The first token of a conversation has nothing before it to be predicted from.
        return sum(int(self._turns[m].learned[1:].sum()) for m in self._members[number])


@dataclass(frozen=True)
class RenderedConversations:
    """Conversations as tokens, and what was lost on the way."""

    turns: list[Turns]
    digest: str
    notes: tuple[str, ...]


def render_all(tokenizer: Any, examples: Examples[Conversation], most: int, skip_bad: bool) -> RenderedConversations:
    """All conversations as tokens; those that do not fit are cut after a turn.

    Args:
        tokenizer: with a chat template.
        examples: the conversations.
        most: tokens that one may have.
        skip_bad: skip a conversation that cannot be rendered instead of refusing all.

    Raises:
        ConversationError: the tokenizer has no chat template; a conversation cannot be rendered; its place is named.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConversationError("the tokenizer has no chat template, which says how a conversation becomes text")
    turns, bad, cut = [], [], 0
    for conversation, place in zip(examples.items, examples.places, strict=True):
        try:
            made = render_turns(tokenizer, conversation, most)
        except ValueError as error:
            if not skip_bad:
                raise ConversationError(f"{place}: {error}") from None
            bad.append(f"{place}: {error}")
            continue
        turns.append(made)
        cut += made.dropped > 0
    if not turns:
        raise ConversationError(f"none of {len(bad)} conversations can be used; {bad[0]}")
    notes = [*examples.notes]
    if cut:
        notes.append(f"{cut:,} conversations were cut after the last turn that ends within {most:,} tokens")
    if bad:
        notes.append(f"{len(bad):,} conversations were skipped: {bad[0]}")
    digest = hashlib.sha256(f"{most}".encode())
    for each in turns:
        digest.update(each.ids.astype("<i4").tobytes() + each.learned.tobytes())
    return RenderedConversations(turns, digest.hexdigest(), tuple(notes))
