"""From tokens to packed blocks: a memory-mapped cache -> blocks -> batches in a reproducible order.

Every step is a function of its inputs and a seed, so that the position in the data is one number: how many blocks
were used. This file knows nothing about models; `documents` reads files and `data.token_cache` makes tokens of them.

Shapes: B sequences of a batch, T tokens of a block.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.loss import IGNORE_INDEX
from .documents import DataError
from .token_cache import TokenCache


def split_documents(cache: TokenCache, share: float, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Document numbers for training and for the held-out part, which gets `share` of them, at least one.

    `name` is what a message calls the text.
    """
    order = random_generator(seed, 0x5EED).permutation(cache.num_documents)
    count = max(1, round(share * cache.num_documents)) if share > 0 else 0
    if count >= cache.num_documents:
        raise DataError(
            f"{name}: held-out share {share} leaves no document to train on, of {cache.num_documents}; a .txt or .md "
            f"file is one document, and a .jsonl file has one in each line"
        )
    return np.sort(order[count:]), np.sort(order[:count])


def random_generator(*entropy: int) -> np.random.Generator:
    """NumPy's generator for a seed and a purpose."""
    return np.random.Generator(np.random.PCG64(list(entropy)))


class EpochOrder:
    """A new random order of `count` examples in every epoch, for a seed and a purpose."""

    def __init__(self, count: int, *entropy: int) -> None:
        self._count, self._entropy = count, entropy
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def at(self, position: int) -> int:
        """The number of the example at a position of the endless stream."""
        epoch, inside = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, random_generator(*self._entropy, epoch).permutation(self._count)
        return int(self._order[inside])


# --- blocks ------------------------------------------------------------------------------------------------------


class PackedBlocks:
    """Documents packed into blocks of T tokens by best fit, so that none is cut unless it is longer than a block.

    A longer document becomes several pieces, each starting with the last token of the one before, which is context
    only: every token but the first of a document is predicted exactly once. Best-fit packing: Ding et al. 2024,
    "Fewer Truncations Improve Language Modeling".

    Args:
        cache: the tokens.
        block: T.
        documents: numbers of the documents to use; all if None.
        seed: determines which documents of the same length share blocks.
    """

    def __init__(self, cache: TokenCache, block: int, documents: np.ndarray | None = None, seed: int = 0) -> None:
        if block < 2:
            raise DataError(f"sequence length is {block}; it must be at least 2")
        self.cache = cache
        self.block = block
        numbers = np.arange(cache.num_documents) if documents is None else documents
        self.text_bytes = int(cache.text_bytes[numbers].sum())
        starts, lengths = _pieces(cache.starts[numbers], cache.starts[numbers + 1], block)
        if not len(starts):
            raise DataError("no document has two tokens or more, so there is nothing to predict")
        shuffle = random_generator(seed, 0xB10C).permutation(len(starts))
        self._starts, self._lengths = starts[shuffle], lengths[shuffle]
        self._members = best_fit(self._lengths, block)
        self.num_scored = int((self._lengths - 1).sum())

    def __len__(self) -> int:
        return len(self._members)

    def scored(self, index: int) -> int:
        """How many tokens of a block are predicted."""
        return sum(int(self._lengths[m]) - 1 for m in self._members[index])

    def layout(self) -> str:
        """SHA-256 of which tokens each block holds."""
        order = np.concatenate([np.asarray([len(members), *members]) for members in self._members])
        digest = hashlib.sha256(f"{self.cache.key} {self.block}".encode())
        for numbers in (self._starts, self._lengths, order):
            digest.update(np.ascontiguousarray(numbers, dtype="<i8").tobytes())
        return digest.hexdigest()

    def check(self, vocab_size: int, sequence: int) -> None:
        """Refuse a model or a sequence length that the text was not tokenized and packed for.

        Raises:
            DataError: blocks of another length than `sequence`; a token that the vocabulary does not have.
        """
        if self.block != sequence:
            raise DataError(f"the data's blocks have {self.block} tokens; they must have sequence = {sequence}")
        highest = int(self.cache.tokens.max())
        if highest >= vocab_size:
            raise DataError(f"the data has token id {highest}; the model's vocab_size is {vocab_size}")

    def pieces(self, index: int) -> list[np.ndarray]:
        """The tokens of each piece of a block."""
        spans = ((self._starts[m], self._lengths[m]) for m in self._members[index])
        return [np.asarray(self.cache.tokens[start : start + length]) for start, length in spans]


def _pieces(starts: np.ndarray, ends: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most `block` tokens that overlap by one token."""
    counts = np.maximum(0, -(-(ends - starts - 1) // (block - 1)))
    first = np.repeat(np.cumsum(counts) - counts, counts)
    offset = (np.arange(counts.sum()) - first) * (block - 1)
    piece_starts = np.repeat(starts, counts) + offset
    return piece_starts, np.minimum(np.repeat(ends, counts) - piece_starts, block)


def best_fit(lengths: np.ndarray, block: int) -> list[list[int]]:
    """Assign pieces, longest first, to the block with the least room that still holds them."""
    members: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(block + 1)]
    rooms = 0  # bit r is set where by_room[r] is not empty, which makes the search one shift
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            index = by_room[room].pop()
            rooms &= ~(1 << room) if not by_room[room] else -1
            members[index].append(piece)
        else:
            room, index = block, len(members)
            members.append([piece])
        if room > length:
            by_room[room - length].append(index)
            rooms |= 1 << (room - length)
    return members


@dataclass(frozen=True)
class Batch:
    """Packed blocks as tensors; all are (B, T) int64 but `indices`."""

    input_ids: Tensor
    position_ids: Tensor
    """Start again at 0 with each piece, from which transformers sees where one ends, and keeps attention inside."""
    labels: Tensor
    """Hugging Face convention (not shifted); -100 at the first token of each piece and at padding."""
    num_items: int
    """Scored labels of the whole optimizer step, of which this batch may be a part; the divisor of the loss."""
    indices: Tensor | None = None
    """(B,) int64: number of each block among all blocks of its stream, the same in every epoch; None outside one."""

    @property
    def num_scored(self) -> int:
        """Scored labels in this batch."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        moved = (x.to(device) for x in (self.input_ids, self.position_ids, self.labels))
        return Batch(*moved, num_items=self.num_items, indices=self.indices)


def collate(blocks: Sequence[Sequence[np.ndarray]], length: int, pad: int = 0) -> Batch:
    """Put the pieces of each block into a row of `length` tokens; the rest is padding that nothing attends to."""
    ids = np.full((len(blocks), length), pad, dtype=np.int64)
    positions = np.zeros_like(ids)
    labels = np.full_like(ids, IGNORE_INDEX)
    for row, pieces in enumerate(blocks):
        at = 0
        for piece in pieces:
            stop = at + len(piece)
            ids[row, at:stop] = piece
            positions[row, at:stop] = np.arange(len(piece))
            labels[row, at + 1 : stop] = piece[1:]
            at = stop
        positions[row, at:] = np.arange(length - at)
    scored = int((labels != IGNORE_INDEX).sum())
    return Batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(labels), scored)


class BlockStream:
    """An endless stream of blocks from weighted sources, in an order fixed by the seed, with random access.

    An epoch takes `weight * len(blocks)` blocks of each source and shuffles them together. Each source is used up
    before it repeats: a new permutation begins where the last one ended, not where the epoch does.
    """

    def __init__(self, sources: Sequence[tuple[PackedBlocks, float]], seed: int) -> None:
        if not sources:
            raise DataError("no data source is given")
        self.sources = [blocks for blocks, _ in sources]
        self.weights = [weight for _, weight in sources]
        self.block = self.sources[0].block
        self.counts = [max(1, round(weight * len(blocks))) for blocks, weight in sources]
        # Index of the first block of each source among all blocks, and the number of all.
        self.firsts = [0, *itertools.accumulate(len(blocks) for blocks in self.sources)]
        self.seed = seed
        self._source = np.repeat(np.arange(len(sources)), self.counts)
        self._within = np.concatenate([np.arange(count) for count in self.counts])
        self._permutations: dict[tuple[int, ...], np.ndarray] = {}

    def __len__(self) -> int:
        """Blocks in an epoch."""
        return len(self._source)

    @property
    def key(self) -> dict[str, float]:
        """The weight of each source by a digest of its tokens."""
        return {s.cache.key[:16]: w for s, w in zip(self.sources, self.weights, strict=True)}

    @property
    def origins(self) -> list[dict[str, Any]]:
        """Of each source: weight, files with their digests, tokenizer and how the text was read; JSON values."""
        return [{"weight": w, **s.cache.origin} for s, w in zip(self.sources, self.weights, strict=True)]

    def check(self, vocab_size: int, sequence: int) -> None:
        """As of `PackedBlocks.check`, of every source."""
        for blocks in self.sources:
            blocks.check(vocab_size, sequence)

    def locate(self, position: int) -> tuple[int, int]:
        """(source, block) at a position of the stream."""
        epoch, inside = divmod(position, len(self))
        item = self._permutation(len(self), 0, epoch)[inside]
        source = int(self._source[item])
        size = len(self.sources[source])
        turn, index = divmod(epoch * self.counts[source] + int(self._within[item]), size)
        return source, int(self._permutation(size, source + 1, turn)[index])

    def _permutation(self, size: int, *purpose: int) -> np.ndarray:
        if purpose not in self._permutations:
            while len(self._permutations) > 4 * len(self.sources) + 4:
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[purpose] = random_generator(self.seed, *purpose).permutation(size)
        return self._permutations[purpose]

    def batches(
        self, start: int, count: int, at_once: int, pad: int = 0, share: tuple[int, int] = (0, 1)
    ) -> list[Batch]:
        """Blocks `start` to `start + count`, as batches of `at_once` that count as one step.

        Of several processes each takes its `share`, (number, of how many): the first the first blocks, and so on.
        """
        found = [self.locate(start + i) for i in range(count)]
        scored = sum(self.sources[source].scored(index) for source, index in found)
        number, ways = share
        mine = found[number * count // ways : (number + 1) * count // ways]
        blocks = [self.sources[source].pieces(index) for source, index in mine]
        indices = torch.tensor([self.firsts[source] + index for source, index in mine])
        return [
            replace(
                collate(blocks[i : i + at_once], self.block, pad), num_items=scored, indices=indices[i : i + at_once]
            )
            for i in range(0, len(blocks), at_once)
        ]
