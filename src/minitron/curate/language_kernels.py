"""fastText's classifier inside compiled code: many texts at once, the same labels, and probabilities up to rounding.

It reads models with quantized inputs and a tree of labels, as lid.176.ftz is (Joulin et al. 2016, "FastText.zip"): the
vectors of a text's words and of the words' character n-grams are averaged, and the tree is searched for its most
probable leaf. Numbers have 32 bits and are added in fastText's order.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from ..engine.cpu.compiled import cached
from .texts import Texts

_MAGIC, _VERSION = 793712314, 12
_ARGUMENTS = ("dim", "ws", "epoch", "minCount", "neg", "wordNgrams", "loss", "model", "bucket", "minn", "maxn", "lrate")
_HIERARCHICAL, _SUPERVISED = 1, 3
_LABEL = b"__label__"
_CENTROIDS = 256
Floats = np.ndarray[Any, np.dtype[np.float32]]
Numbers = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Classifier:
    """A model as the kernel wants it."""

    labels: tuple[str, ...]
    vectors: Floats
    """(words + n-grams, dim)."""
    rows: Numbers
    """(buckets,) row of the n-grams of a bucket, or -1."""
    slots: Numbers
    """(slots,) number of a token of the dictionary, or -1: a table with open addressing."""
    spelling: np.ndarray[Any, np.dtype[np.uint8]]
    """The tokens, one behind the other."""
    bounds: Numbers
    """(tokens + 1,) of their spellings."""
    facts: Numbers
    """Words of the dictionary, shortest and longest n-gram, number of the end of a line."""
    nodes: Floats
    """(labels - 1, dim): the inner nodes of the tree."""
    children: Numbers
    """(2 labels - 1, 2): of each node; -1 of a leaf, which is a label."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{kinds}", self._data, self._at)
        self._at += struct.calcsize(f"<{kinds}")
        return found

    def word(self) -> bytes:
        end = self._data.index(b"\0", self._at)
        found, self._at = self._data[self._at : end], end + 1
        return found

    def array(self, kind: str, count: int) -> Any:
        found = np.frombuffer(self._data, dtype=np.dtype(kind), count=count, offset=self._at)
        self._at += found.nbytes
        return found


def read_classifier(path: Path) -> Classifier:
    """A model from the file that fastText writes.

    Raises:
        ValueError: a file of another kind, or a model of a kind that this module does not know.
    """
    reader = _Reader(path.read_bytes())
    if reader.numbers("ii") != (_MAGIC, _VERSION):
        raise ValueError(f"{path}: not a fastText model of version {_VERSION}")
    arguments = dict(zip(_ARGUMENTS, reader.numbers("12i"), strict=True))
    reader.numbers("d")
    kind = arguments["model"], arguments["loss"], arguments["wordNgrams"]
    if kind != (_SUPERVISED, _HIERARCHICAL, 1):
        raise ValueError(f"{path}: a fastText model of another kind (model, loss, wordNgrams: {kind})")
    size, words, labels, _, pruned = reader.numbers("iiiqq")
    tokens, counts = [], []
    for _ in range(size):
        tokens.append(reader.word())
        counts.append(reader.numbers("qb")[0])
    rows = np.full(arguments["bucket"], -1, dtype=np.int32)
    pairs = reader.array("<i4", 2 * max(0, pruned)).reshape(-1, 2)
    rows[pairs[:, 0]] = words + pairs[:, 1]
    vectors = _matrix(reader, path)
    nodes = _matrix(reader, path)[: labels - 1]
    slots, bounds = _dictionary(tokens)
    spelling = np.frombuffer(b"".join(tokens), dtype=np.uint8)
    facts = np.asarray([words, arguments["minn"], arguments["maxn"], tokens.index(b"</s>")], dtype=np.int32)
    names = tuple(token.removeprefix(_LABEL).decode() for token in tokens[words:])
    return Classifier(names, vectors, rows, slots, spelling, bounds, facts, nodes, _tree(counts[words:]))


def _matrix(reader: _Reader, path: Path) -> Floats:
    """A matrix of the file; of a quantized one the rows that its codes stand for."""
    (quantized,) = reader.numbers("?")
    if not quantized:
        rows, columns = reader.numbers("qq")
        return reader.array("<f4", rows * columns).reshape(rows, columns).copy()
    (with_norms,) = reader.numbers("?")
    rows, columns = reader.numbers("qq")
    (size,) = reader.numbers("i")
    codes = reader.array("u1", size).reshape(rows, -1)
    found = _decoded(codes, *_quantizer(reader))[:, :columns]
    if with_norms:
        norms = reader.array("u1", rows)
        found = found * _decoded(norms[:, None], *_quantizer(reader))
    return np.ascontiguousarray(found, dtype=np.float32)


def _quantizer(reader: _Reader) -> tuple[list[int], Floats]:
    """(widths of the parts of a vector, centroids of all parts one behind the other)."""
    dim, parts, width, last = reader.numbers("4i")
    return [width] * (parts - 1) + [last], reader.array("<f4", dim * _CENTROIDS)


def _decoded(codes: Any, widths: list[int], centroids: Floats) -> Floats:
    """(rows, dim): the centroids that the codes of the parts name."""
    at, columns = 0, []
    for part, width in enumerate(widths):
        table = centroids[at : at + _CENTROIDS * width].reshape(_CENTROIDS, width)
        columns.append(table[codes[:, part]])
        at += _CENTROIDS * width
    return np.concatenate(columns, axis=1)


def _dictionary(tokens: list[bytes]) -> tuple[Numbers, Numbers]:
    """(slots, bounds) of `Classifier`."""
    slots = np.full(1 << (4 * len(tokens)).bit_length(), -1, dtype=np.int32)
    for number, token in enumerate(tokens):
        slot = _hash_of(token) & (len(slots) - 1)
        while slots[slot] >= 0:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = number
    bounds = np.zeros(len(tokens) + 1, dtype=np.int32)
    np.cumsum([len(token) for token in tokens], out=bounds[1:])
    return slots, bounds


def _hash_of(token: bytes) -> int:
    found = 2166136261
    for byte in token:
        # fastText's bytes have a sign.
        found = ((found ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * 16777619) & 0xFFFFFFFF
    return found


def _tree(counts: list[int]) -> Numbers:
    """(2 labels - 1, 2) children in the Huffman tree of labels that are sorted by count, the most frequent first."""
    labels = len(counts)
    weights = [*counts, *([10**15] * (labels - 1))]
    children = np.full((2 * labels - 1, 2), -1, dtype=np.int32)
    leaf, node = labels - 1, labels
    for made in range(labels, 2 * labels - 1):
        for side in range(2):
            if leaf >= 0 and weights[leaf] < weights[node]:
                children[made, side], leaf = leaf, leaf - 1
            else:
                children[made, side], node = node, node + 1
        weights[made] = weights[children[made, 0]] + weights[children[made, 1]]
    return children


@njit(nogil=True)
def _hashed(h, byte):  # type: ignore[no-untyped-def]
    """One step of FNV-1a with 32 bits, of bytes that have a sign."""
    signed = np.uint32(byte) if byte < 128 else np.uint32(byte) | np.uint32(0xFFFFFF00)
    return np.uint32(np.uint32(h ^ signed) * np.uint32(16777619))


@njit(nogil=True)
def _number_of(data, start, stop, slots, spelling, bounds):  # type: ignore[no-untyped-def]
    """Number of a token in the dictionary, or -1."""
    h = np.uint32(2166136261)
    for i in range(start, stop):
        h = _hashed(h, data[i])
    slot = np.int64(h) & (len(slots) - 1)
    while slots[slot] >= 0:
        number = slots[slot]
        same = bounds[number + 1] - bounds[number] == stop - start
        for i in range(start, stop):
            if not same:
                break
            same = spelling[bounds[number] + i - start] == data[i]
        if same:
            return number
        slot = (slot + 1) & (len(slots) - 1)
    return np.int32(-1)


@njit(nogil=True)
def _add(vectors, row, hidden):  # type: ignore[no-untyped-def]
    for k in range(len(hidden)):
        hidden[k] += vectors[row, k]


@njit(nogil=True)
def _add_grams(word, size, shortest, longest, rows, vectors, hidden):  # type: ignore[no-untyped-def]
    """Add the vectors of a word's character n-grams; returns how many there are. The word stands between < and >."""
    count = 0
    buckets = np.uint32(len(rows))
    for i in range(size):
        if word[i] & 0xC0 == 0x80:
            continue
        h, j, n = np.uint32(2166136261), i, 0
        while j < size and n < longest:
            h = _hashed(h, word[j])
            j += 1
            while j < size and word[j] & 0xC0 == 0x80:
                h = _hashed(h, word[j])
                j += 1
            n += 1
            if n >= shortest and not (n == 1 and (i == 0 or j == size)):
                row = rows[h % buckets]
                if row >= 0:
                    _add(vectors, row, hidden)
                    count += 1
    return count


@njit(nogil=True)
def _is_space(byte):  # type: ignore[no-untyped-def]
    return byte == 32 or 9 <= byte <= 13 or byte == 0


@njit(nogil=True)
def _is_label(data, start, stop):  # type: ignore[no-untyped-def]
    """Whether a token begins as labels do, which are no words."""
    label = (95, 95, 108, 97, 98, 101, 108, 95, 95)
    same = 0
    while same < len(label) and start + same < stop and data[start + same] == label[same]:
        same += 1
    return same == len(label)


@njit(nogil=True)
def _hide(data, start, stop, facts, slots, spelling, bounds, rows, vectors, word, hidden):  # type: ignore[no-untyped-def]
    """The mean vector of a line goes into `hidden`; returns of how many vectors."""
    words, shortest, longest, line_end = facts[0], facts[1], facts[2], facts[3]
    hidden[:] = 0
    count = 0
    i = start
    while i < stop:
        while i < stop and _is_space(data[i]):
            i += 1
        begin = i
        while i < stop and not _is_space(data[i]):
            i += 1
        if i == begin:
            continue
        number = _number_of(data, begin, i, slots, spelling, bounds)
        if number == line_end:
            break
        if number >= words or (number < 0 and _is_label(data, begin, i)):
            continue
        if number >= 0:
            _add(vectors, number, hidden)
            count += 1
        size = i - begin + 2
        word[0], word[size - 1] = 60, 62
        word[1 : size - 1] = data[begin:i]
        count += _add_grams(word, size, shortest, longest, rows, vectors, hidden)
    _add(vectors, line_end, hidden)
    count += 1
    share = np.float32(1.0 / count)
    for k in range(len(hidden)):
        hidden[k] *= share
    return count


@njit(nogil=True)
def _std_log(x):  # type: ignore[no-untyped-def]
    return np.float32(math.log(np.float64(x) + 1e-5))


@njit(nogil=True)
def _search(nodes, children, hidden, stack, scores):  # type: ignore[no-untyped-def]
    """(label, logarithm of its probability) of the most probable leaf; label -1 if none is probable enough."""
    labels = len(nodes) + 1
    best, best_score = np.int32(-1), np.float32(0)
    least = _std_log(np.float32(0))
    stack[0], scores[0] = 2 * labels - 2, 0
    depth = 1
    while depth:
        depth -= 1
        node, score = stack[depth], scores[depth]
        if score < least or (best >= 0 and score < best_score):
            continue
        if children[node, 0] < 0:
            # Of equal scores the heap of fastText gives up the one that came first.
            best, best_score = node, score
            continue
        f = np.float32(0)
        for k in range(len(hidden)):
            f += nodes[node - labels, k] * hidden[k]
        f = np.float32(1.0 / np.float64(np.float32(1) + np.float32(math.exp(np.float32(-f)))))
        # The left one is looked at first.
        stack[depth], scores[depth] = children[node, 1], score + _std_log(f)
        stack[depth + 1] = children[node, 0]
        scores[depth + 1] = score + _std_log(np.float32(1.0 - np.float64(f)))
        depth += 2
    return best, best_score


def _build(digest: int) -> Any:
    def classify_texts(data, offsets, facts, slots, spelling, bounds, rows, vectors, nodes, children, found, logs):  # type: ignore[no-untyped-def]
        version = digest  # noqa: F841  part of the name of the cached code
        hidden = np.empty(vectors.shape[1], dtype=np.float32)
        stack, scores = np.empty(len(children), dtype=np.int64), np.empty(len(children), dtype=np.float32)
        longest = 0
        for t in range(len(offsets) - 1):
            longest = max(longest, offsets[t + 1] - offsets[t])
        word = np.empty(longest + 2, dtype=np.uint8)
        for t in range(len(offsets) - 1):
            _hide(data, offsets[t], offsets[t + 1], facts, slots, spelling, bounds, rows, vectors, word, hidden)
            found[t], logs[t] = _search(nodes, children, hidden, stack, scores)

    return classify_texts


_kernel = cached(_build, __file__)


def classify(texts: Texts, model: Classifier) -> tuple[Numbers, Floats]:
    """(texts,) numbers of labels, -1 for none, and (texts,) their probabilities.

    Args:
        texts: lines; a line feed inside one counts as a space.
        model: see `read_classifier`.
    """
    found, logs = np.zeros(len(texts), dtype=np.int32), np.zeros(len(texts), dtype=np.float32)
    _kernel(
        texts.data, texts.offsets, model.facts, model.slots, model.spelling, model.bounds, model.rows, model.vectors,
        model.nodes, model.children, found, logs,
    )  # fmt: skip
    return found, np.asarray([math.exp(x) for x in logs.tolist()], dtype=np.float32)
