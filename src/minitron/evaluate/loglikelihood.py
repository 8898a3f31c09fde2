"""Log-probabilities of continuations, each shared prefix computed once.

Requests are sorted by their tokens, and neighbours with a common prefix are laid out as a tree in one row: a shared
token is in it once, and each token attends to its ancestors only. What the next row shares with this one (the examples
of a few-shot prompt, a long context) stays in the KV cache. Rows that share nothing are sorted by length and batched.
The last layer and the LM head run at scored positions only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cache import NemotronCache
from ..framework import CACHE_NAME
from .last_layer import last_layer_at
from .scoring import pair_scores

ROW_TOKENS = {"cpu": 512, "cuda": 8192}
"""Approximate number of new tokens in a row. More waste attention on tokens of other requests, fewer waste matrix
products."""
BATCH_TOKENS = {"cpu": 3072, "cuda": 8192}
"""Largest number of tokens in a batch of rows of nearly one length: calls take long in a small model."""
LEAST_FILLED = 0.9
"""Share of the longest row that the other rows of such a batch have."""
LEAST_REUSE = 16
"""A shorter shared prefix is recomputed instead of kept."""


class Request(NamedTuple):
    """Token ids: the log-probability of `continuation` after `context` is wanted. Neither is empty."""

    context: list[int]
    continuation: list[int]


class Answer(NamedTuple):
    """The answer to a request."""

    log_prob: float
    """Log-probability of the whole continuation, nats."""
    greedy: bool
    """Whether greedy decoding would write the continuation."""


@dataclass(frozen=True)
class _Window:
    index: int  # of the request
    ids: np.ndarray  # the model's input: context and continuation without its last token, truncated from the left
    targets: list[int]  # the last positions of `ids` predict these

    @property
    def first_scored(self) -> int:
        return len(self.ids) - len(self.targets)


@dataclass(frozen=True)
class _Row:
    windows: list[_Window]
    shared: list[int]  # per window: length of the prefix shared with the one before (the first: with the cache)
    reuse: int  # length of the prefix that the previous row's cache holds
    stem: int  # length of the prefix that all windows share

    @property
    def size(self) -> int:
        """New tokens."""
        return sum(len(w.ids) - max(n, self.reuse) for w, n in zip(self.windows, self.shared, strict=True))


def was_truncated(request: Request, context: int) -> bool:
    """Whether the request has to be truncated from the left to fit into `context` positions."""
    return len(request.context) + len(request.continuation) > context + 1


def _window(index: int, request: Request, context: int) -> _Window:
    if not request.context or not request.continuation:
        raise ValueError(f"request {index} has an empty context or continuation; each needs a token")
    if len(request.continuation) > context:
        raise ValueError(
            f"request {index}: the continuation has {len(request.continuation)} tokens; "
            f"the model's context is {context}"
        )
    ids = np.array((request.context + request.continuation)[-(context + 1) :][:-1], dtype=np.int64)
    return _Window(index, ids, request.continuation)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _rows(windows: list[_Window], budget: int) -> Iterator[_Row]:
    """Consecutive windows of the sorted list, up to `budget` new tokens."""
    common = [0] + [_common(a.ids, b.ids) for a, b in itertools.pairwise(windows)]
    start, stem_before = 0, 0
    while start < len(windows):
        end, new, first_fresh, stem = start, 0, 0, len(windows[start].ids)
        reuse = min(stem_before, common[start])
        while end < len(windows):
            fresh = len(windows[end].ids) - (reuse if end == start else common[end])
            # Scored positions must be in the row: a kept prefix has no hidden states.
            kept = min(reuse, windows[end].first_scored, stem if end == start else common[end])
            worth = kept >= LEAST_REUSE or reuse < LEAST_REUSE
            # A row that one long window fills takes other endings of that window, too.
            room = max(budget, first_fresh * 5 // 4) - new
            apart = end > start and common[end] < LEAST_REUSE  # nothing to share: a row of its own
            if end > start and (fresh > max(room, 0) or not worth or apart):
                break
            if end > start:
                stem = min(stem, common[end])
            reuse = kept if kept >= LEAST_REUSE else 0
            first_fresh = fresh if end == start else first_fresh
            new += fresh
            end += 1
        yield _Row(windows[start:end], [reuse, *common[start + 1 : end]], reuse, stem)
        start, stem_before = end, stem


_END = _Row([], [], 0, 0)


class _Layout(NamedTuple):
    ids: np.ndarray  # (T,)
    depth: np.ndarray  # (T,) position of each token in its sequence
    paths: list[np.ndarray]  # per window: indices in the row of its tokens after the reused prefix
    sees: np.ndarray | None  # (T, reuse + T) bool; None where the row is a plain sequence


def _lay_out(row: _Row) -> _Layout:
    paths: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    depth: list[np.ndarray] = []
    spans: list[tuple[int, int]] = []
    size = 0
    for window, shared in zip(row.windows, row.shared, strict=True):
        shared = max(shared, row.reuse)
        fresh = len(window.ids) - shared
        old = paths[-1][: shared - row.reuse] if paths else np.empty(0, dtype=np.int64)
        paths.append(np.concatenate([old, np.arange(size, size + fresh)]))
        ids.append(window.ids[shared:])
        depth.append(np.arange(shared, shared + fresh))
        spans.append((size, size + fresh))
        size += fresh
    sees = None
    if row.reuse or size > max(len(path) for path in paths):  # otherwise each window begins the longest one
        sees = np.zeros((size, row.reuse + size), dtype=bool)
        sees[:, : row.reuse] = True
        for (first, last), path in zip(spans, paths, strict=True):
            above = path[: len(path) - (last - first)]
            sees[first:last, row.reuse + above] = True
            sees[first:last, row.reuse + first : row.reuse + last] = np.tri(last - first, dtype=bool)
    return _Layout(np.concatenate(ids), np.concatenate(depth), paths, sees)


def _batches(rows: list[_Row], budget: int, full: int) -> Iterator[list[_Row]]:
    """Batches of rows of similar lengths: up to `budget` tokens with their padding, `full` with hardly any."""
    rows = sorted(rows, key=lambda row: -row.size)
    while rows:
        longest = rows[0].size
        count = max(1, budget // longest)
        while count < min(len(rows), full // longest) and rows[count].size >= LEAST_FILLED * longest:
            count += 1
        yield rows[:count]
        rows = rows[count:]


def _padded(parts: list[np.ndarray], device: torch.device) -> Tensor:
    """(B, T) int64, padded with zeros at the end."""
    out = np.zeros((len(parts), max(map(len, parts))), dtype=np.int64)
    for row, part in enumerate(parts):
        out[row, : len(part)] = part
    return torch.from_numpy(out).to(device)


def _mask(layouts: list[_Layout], like: Tensor) -> Tensor | None:
    """Additive (B, 1, T, S) in the dtype of the model; None for plain sequences, whose padding is at the end."""
    if all(layout.sees is None for layout in layouts):
        return None
    seen = [np.tri(len(x.ids), dtype=bool) if x.sees is None else x.sees for x in layouts]
    allowed = np.zeros((len(seen), max(x.shape[0] for x in seen), max(x.shape[1] for x in seen)), dtype=bool)
    for row, part in enumerate(seen):
        allowed[row, : part.shape[0], : part.shape[1]] = part
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~torch.from_numpy(allowed).to(like.device), torch.finfo(like.dtype).min)[:, None]


def _positions(row: _Row, layout: _Layout) -> np.ndarray:
    """(M,) index in the row at which each target of each window is predicted."""
    return np.concatenate([p[len(p) - len(w.targets) :] for p, w in zip(layout.paths, row.windows, strict=True)])


def _forward(model: Any, rows: list[_Row], cache: NemotronCache | None) -> list[tuple[int, Answer]]:
    """Answer a batch of rows. A cache, which is extended, is allowed with a single row only."""
    layouts = [_lay_out(row) for row in rows]
    positions = [_positions(row, layout) for row, layout in zip(rows, layouts, strict=True)]
    scored = np.unique(np.concatenate(positions))
    device = model.device
    more: dict[str, Any] = {CACHE_NAME: cache, "use_cache": cache is not None}
    mask = _mask(layouts, model.lm_head.weight)
    if mask is not None:
        more |= {"attention_mask": mask, "position_ids": _padded([layout.depth for layout in layouts], device)}
    ids = _padded([layout.ids for layout in layouts], device)
    with last_layer_at(model.model, torch.from_numpy(scored).to(device)):
        hidden = model.model(ids, **more).last_hidden_state
    # The indices in each row that predict targets, row by row; several targets may share one.
    unique = [np.unique(row_positions, return_inverse=True) for row_positions in positions]
    rows_of = np.repeat(np.arange(len(rows)), [len(found) for found, _ in unique])
    columns = np.searchsorted(scored, np.concatenate([found for found, _ in unique]))
    starts = np.cumsum([0, *(len(found) for found, _ in unique)])
    position = np.concatenate([inverse + start for (_, inverse), start in zip(unique, starts, strict=False)])
    kept = hidden[torch.from_numpy(rows_of).to(device), torch.from_numpy(columns).to(device)]
    return _answers(model, kept, [window for row in rows for window in row.windows], position)


def _answers(model: Any, hidden: Tensor, windows: list[_Window], position: np.ndarray) -> list[tuple[int, Answer]]:
    """Answers from hidden states (N, D); `position` (M,) is the index of the one that predicts each target."""
    tokens = np.concatenate([w.targets for w in windows])
    owner = np.repeat(np.arange(len(windows)), [len(w.targets) for w in windows])
    order = np.argsort(position, kind="stable")
    device = hidden.device
    found = pair_scores(
        model.lm_head, hidden, torch.from_numpy(position[order]).to(device), torch.from_numpy(tokens[order]).to(device)
    )
    sums = np.bincount(owner[order], found.log_probs.double().cpu().numpy(), len(windows))
    misses = np.bincount(owner, found.best.cpu().numpy()[position] != tokens, len(windows))
    return [
        (window.index, Answer(float(total), not missed))
        for window, total, missed in zip(windows, sums, misses, strict=True)
    ]


def _shorten(cache: NemotronCache, length: int) -> None:
    surplus = cache.get_seq_length() - length
    if surplus:
        cache.crop(-surplus)


@torch.inference_mode()
def loglikelihoods(
    model: Any,
    requests: Sequence[Request],
    context: int | None = None,
    row_tokens: int | None = None,
) -> Iterator[list[tuple[int, Answer]]]:
    """Answer requests, in any order.

    Args:
        context: positions of the model that may be used; `max_position_embeddings` if None. Longer requests are
            truncated from the left, as in lm-evaluation-harness.
        row_tokens: see `ROW_TOKENS`; by the device if None.

    Yields:
        After each forward pass: (index, answer) of the requests that it answered.

    Raises:
        ValueError: a request without tokens, or with a continuation longer than the context.
    """
    most: int = model.config.max_position_embeddings
    context = context or most
    full = row_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    row_tokens = row_tokens or ROW_TOKENS.get(model.device.type, ROW_TOKENS["cuda"])
    windows = [_window(index, request, context) for index, request in enumerate(requests)]
    windows.sort(key=lambda w: w.ids.tolist())
    rows = list(_rows(windows, row_tokens))
    follows = [row.reuse > 0 for row in [*rows[1:], _END]]  # the next row continues from this one's cache
    cache: NemotronCache | None = None
    for row, kept in zip(rows, follows, strict=False):
        if not row.reuse and not kept:
            continue
        if row.reuse:
            _shorten(cache, row.reuse)  # type: ignore[arg-type]
        else:
            cache = NemotronCache(config=model.config)
        yield _forward(model, [row], cache)
    del cache
    alone = [row for row, kept in zip(rows, follows, strict=False) if not row.reuse and not kept]
    for batch in _batches(alone, row_tokens, full):
        yield _forward(model, batch, None)
