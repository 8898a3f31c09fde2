"""Pairs of replies as tokens: the stream of preferences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.examples import Conversation, Examples
from ..data.packing import EpochOrder
from ..data.preferences import Preference, Replied
from ..ops.loss import IGNORE_INDEX
from .conversations import ConversationError, Turns, render_turns, show_learned
from .rows import Row, pad_rows


@dataclass(frozen=True)
class Pair:
    """Two replies with their prompt, as tokens; labels stand at the tokens of the replies alone."""

    chosen: Row
    rejected: Row
    reference: tuple[float, float] | None = None
    """Log-probabilities of both replies under the model before training, in nats."""


@dataclass(frozen=True)
class PairBatch:
    """Pairs as tensors: a `train.stream.TrainingBatch`."""

    input_ids: Tensor
    """(2 B, T) int64: the chosen replies, then the rejected ones, padded on the right."""
    attention_mask: Tensor
    """(2 B, T)."""
    labels: Tensor
    """(2 B, T): tokens of the replies; `IGNORE_INDEX` elsewhere."""
    reference: Tensor | None
    """(2 B,) fp64."""
    num_items: int
    """Pairs of the whole optimizer step: the divisor of the loss."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PairBatch:
        """The batch on a device."""
        reference = None if self.reference is None else self.reference.to(device)
        return replace(self, input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device),
                       labels=self.labels.to(device), reference=reference)  # fmt: skip


def pad_pairs(pairs: Sequence[Pair], pad: int) -> PairBatch:
    """Pairs as one batch."""
    padded = pad_rows([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)], pad)
    known = [pair.reference for pair in pairs if pair.reference is not None]
    reference = torch.tensor([pair[i] for i in (0, 1) for pair in known], dtype=torch.float64) if known else None
    return PairBatch(padded.input_ids, padded.attention_mask, padded.targets["labels"], reference, len(pairs))


def encode_pairs(
    tokenizer: Any, examples: Examples[Preference], most: int, skip_bad: bool
) -> tuple[list[Pair], list[str]]:
    """Preferences as tokens, and sentences about what was skipped.

    Args:
        tokenizer: with a chat template, if there are messages.
        examples: the preferences.
        most: tokens of a prompt with its reply. A pair that is longer is skipped: a part of a reply is another reply.
        skip_bad: skip a pair whose messages cannot be rendered instead of refusing all.

    Raises:
        ConversationError: messages cannot be rendered; no pair is left.
    """
    pairs: list[Pair] = []
    long: list[str] = []
    bad: list[str] = []
    for item, place in zip(examples.items, examples.places, strict=True):
        try:
            chosen = _row(tokenizer, item.chosen, item.prompt_messages)
            rejected = _row(tokenizer, item.rejected, item.prompt_messages)
        except ValueError as error:
            if not skip_bad:
                raise ConversationError(f"{place}: {error}") from None
            bad.append(f"{place}: {error}")
            continue
        if max(len(chosen.ids), len(rejected.ids)) > most:
            long.append(place)
        else:
            pairs.append(Pair(chosen, rejected))
    notes = []
    if long:
        notes.append(f"{len(long):,} pairs have more than {most:,} tokens and were skipped, the first: {long[0]}")
    if bad:
        notes.append(f"{len(bad):,} pairs were skipped: {bad[0]}")
    if not pairs:
        raise ConversationError(f"none of {len(examples):,} pairs can be used; {notes[0]}")
    return pairs, notes


def encode_replies(
    tokenizer: Any, texts: Sequence[tuple[str, str | None]], most: int, messages: bool
) -> list[list[int]]:
    """Token ids of prompts with a reply, as a reward model learned them.

    Args:
        tokenizer: of the model.
        texts: (prompt, reply).
        most: tokens of both.
        messages: whether they are the messages of a user and the assistant; else one text that ends with the reply.

    Raises:
        ConversationError: there is no reply, both are longer than `most`, or messages cannot be rendered.
    """
    encoded = []
    for prompt, reply in texts:
        if not reply:
            raise ConversationError("a reward model judges a reply to a prompt; give them as text and pair")
        both: Replied = (prompt, reply)
        if messages:
            both = Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": reply}))
        ids = list(_row(tokenizer, both, 1).ids)
        if len(ids) > most:
            raise ConversationError(
                f"the prompt {prompt!r:.40} and its reply have {len(ids)} tokens; at most {most} fit"
            )
        encoded.append(ids)
    return encoded


def _row(tokenizer: Any, reply: Replied, prompt_messages: int) -> Row:
    if isinstance(reply, Conversation):
        if not getattr(tokenizer, "chat_template", None):
            raise ConversationError("the tokenizer has no chat template, which says how messages become text")
        turns = render_turns(tokenizer, reply)
        before = Conversation(reply.messages[:prompt_messages], reply.tools)
        learned = turns.learned.copy()
        if any(message["role"] == "assistant" for message in before.messages):
            learned[: len(render_turns(tokenizer, before).ids)] = False
        ids = turns.ids.tolist()
    else:
        prompt, text = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in reply)
        special = tokenizer("")["input_ids"]
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id in special else []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*begin, *prompt, *text, *end]
        learned = np.arange(len(ids)) >= len(begin) + len(prompt)
    labels = tuple(token if said else IGNORE_INDEX for token, said in zip(ids, learned, strict=True))
    return Row(tuple(ids), {}, labels)


def show_pair(tokenizer: Any, pair: Pair) -> str:
    """Both replies as the model sees them, what is compared between `[[` and `]]`."""
    shown = []
    for row in (pair.chosen, pair.rejected):
        learned = np.array([label != IGNORE_INDEX for label in row.token_labels or ()])
        shown.append(show_learned(tokenizer, Turns(np.array(row.ids), learned)))
    return f"chosen: {shown[0]}\nrejected: {shown[1]}"


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 of the tokens of pairs in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr([(row.ids, row.token_labels) for row in (pair.chosen, pair.rejected)]).encode())
    return digest.hexdigest()


class PairStream:
    """Pairs in a new order in every epoch: a `train.stream.Stream`.

    Args:
        pairs: the examples.
        pad: id at padding.
        seed: determines the order.
        sequence: tokens that a row may have.
    """

    def __init__(self, pairs: Sequence[Pair], pad: int, seed: int, sequence: int) -> None:
        self._pairs, self._pad, self._seed, self._sequence = list(pairs), pad, seed, sequence
        self._order = EpochOrder(len(self._pairs), seed, 0xD70)

    def __len__(self) -> int:
        """Pairs in an epoch."""
        return len(self._pairs)

    @property
    def key(self) -> dict[str, Any]:
        """As of `Stream`."""
        return {"pairs": hashlib.sha256(f"{self._seed} {self._pad} {pairs_digest(self._pairs)}".encode()).hexdigest()}

    @property
    def origins(self) -> list[dict[str, Any]]:
        """As of `Stream`."""
        return []

    def check(self, vocab_size: int, sequence: int) -> None:
        """As of `Stream`."""
        highest = max(max(row.ids) for pair in self._pairs for row in (pair.chosen, pair.rejected))
        if highest >= vocab_size:
            raise ValueError(f"the pairs have token id {highest}; the model's vocab_size is {vocab_size}")
        if self._sequence != sequence:
            raise ValueError(f"pairs have at most {self._sequence} tokens; sequence is {sequence}")

    def batches(self, start: int, count: int, at_once: int, *, share: tuple[int, int] = (0, 1)) -> list[PairBatch]:
        """As of `Stream`."""
        number, ways = share
        positions = range(start + number * count // ways, start + (number + 1) * count // ways)
        mine = [self._pairs[self._order.at(position)] for position in positions]
        mine.sort(key=lambda pair: max(len(pair.chosen.ids), len(pair.rejected.ids)))
        parts = (mine[i : i + at_once] for i in range(0, len(mine), at_once))
        return [replace(pad_pairs(part, self._pad), num_items=count) for part in parts]
