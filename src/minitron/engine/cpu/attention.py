"""Norms, rotary embedding, the cache of keys and values, and attention of new tokens, as parts of the compiled step."""

from __future__ import annotations

import numpy as np
from numba import njit

from . import gemv
from .formats import FAST
from .gemv import NONE, exp_of, matvec, narrowed
from .tables import (
    CAPACITY,
    HEAD_DIM,
    HEADS,
    KEY_NORM,
    KEYS,
    KV_HEADS,
    POSITIONS,
    QUERY_NORM,
    SLOTS,
    VALUES,
    fp32_at,
    matrix_at,
)


@njit(**FAST)
def _rms_norm(x, gain_at, eps, out):  # type: ignore[no-untyped-def]
    """Divide the rows of x (M, >= D) by their root mean squares into `out` (M, D), which may be x."""
    D = out.shape[1]
    gain = fp32_at(gain_at, 1, D)[0]
    for m in range(x.shape[0]):
        row, normed = x[m, :D], out[m]
        squares = np.float32(0)
        for c in range(D):
            squares += row[c] * row[c]
        scale = np.float32(1) / np.sqrt(squares / np.float32(D) + eps)
        for c in range(D):
            normed[c] = row[c] * scale * gain[c]


@njit(**FAST)
def norm(x, gain_at, offset_at, eps, out):  # type: ignore[no-untyped-def]
    """Normalize the rows of x (M, >= D) into `out` (M, D): layer norm, or RMSNorm where there is no offset."""
    if offset_at == 0:
        _rms_norm(x, gain_at, eps, out)
        return
    D = out.shape[1]
    gain, offset = fp32_at(gain_at, 1, D)[0], fp32_at(offset_at, 1, D)[0]
    for m in range(x.shape[0]):
        row, normed = x[m, :D], out[m]
        total = np.float32(0)
        for c in range(D):
            total += row[c]
        mean = total / np.float32(D)
        squares = np.float32(0)
        for c in range(D):
            squares += (row[c] - mean) * (row[c] - mean)
        scale = np.float32(1) / np.sqrt(squares / np.float32(D) + eps)
        for c in range(D):
            normed[c] = (row[c] - mean) * scale * gain[c] + offset[c]


@njit(**FAST)
def _rotate(head, cos, sin):  # type: ignore[no-untyped-def]
    """Rotate the first channels of one head (H,) in place; cos and sin are (R / 2,)."""
    half = cos.shape[0]
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = b * cos[i] + a * sin[i]


@njit(**FAST)
def _cached(kv_kind, address, groups, sizes, slot):  # type: ignore[no-untyped-def]
    """Keys or values of one slot, (groups * capacity, H); `address` is that of slot 0."""
    rows, H = groups * sizes[CAPACITY], sizes[HEAD_DIM]
    return matrix_at(kv_kind, address + slot * rows * H * kv_kind.itemsize, rows, H)


@njit(**FAST)
def store_heads(kv_kind, first, last, sizes, eps, layer, qkv, cos, sin, mapping):  # type: ignore[no-untyped-def]
    """Norm and rotate queries and keys of heads `first` to `last` in place; store keys and values in the cache."""
    N, groups, H, capacity = layer[HEADS], layer[KV_HEADS], sizes[HEAD_DIM], sizes[CAPACITY]
    for m in range(qkv.shape[0]):
        at, slot = mapping[POSITIONS, m], mapping[SLOTS, m]
        for n in range(first, last):
            head = qkv[m, n * H : (n + 1) * H]
            if n < N + groups:
                gain_at = layer[QUERY_NORM] if n < N else layer[KEY_NORM]
                if gain_at != 0:
                    whole_head = head.reshape((1, H))
                    _rms_norm(whole_head, gain_at, eps, whole_head)
                _rotate(head, cos[at], sin[at])
            if n >= N:
                address = layer[KEYS] if n < N + groups else layer[VALUES]
                row = ((n - N) % groups) * capacity + at
                cached = _cached(kv_kind, address, groups, sizes, slot)[row]
                for i in range(H):
                    cached[i] = narrowed(cached, head[i])


@njit(**FAST)
def _attend_group(keys, values, q, staged, scores, out):  # type: ignore[no-untyped-def]
    """Query heads q (G, H), already scaled, that share keys and values (S, H); scores (G, S) is scratch, out (G, H)."""
    S = keys.shape[0]
    matvec(keys, NONE, q, staged, scores, 0, 0, S)
    for g in range(q.shape[0]):
        row, mixed = scores[g], out[g]
        top = row[0]
        for s in range(S):
            top = max(top, row[s])
        total = np.float32(0)
        for s in range(S):
            p = exp_of(row[s] - top)
            row[s] = p
            total += p
        mixed[:] = np.float32(0)
        gemv.add_all_rows(values, row, mixed)
        scale = np.float32(1) / total
        for i in range(mixed.shape[0]):
            mixed[i] *= scale


@njit(**FAST)
def attend(kv_kind, first, last, sizes, layer, qkv, mapping, staged, all_scores, attended):  # type: ignore[no-untyped-def]
    """Attention of query heads `first` to `last` for every new token: qkv (M, all heads * H) to attended (M, N * H)."""
    N, groups, H, capacity = layer[HEADS], layer[KV_HEADS], sizes[HEAD_DIM], sizes[CAPACITY]
    each = N // groups
    scaling = np.float32(1.0 / np.sqrt(H))
    while first < last:
        group = first // each
        end = min((group + 1) * each, last)
        at = group * capacity
        for m in range(qkv.shape[0]):
            S, slot = mapping[POSITIONS, m] + 1, mapping[SLOTS, m]
            keys = _cached(kv_kind, layer[KEYS], groups, sizes, slot)[at : at + S]
            values = _cached(kv_kind, layer[VALUES], groups, sizes, slot)[at : at + S]
            flat = qkv[m, first * H : end * H]
            for i in range(flat.shape[0]):
                flat[i] *= scaling
            q = flat.reshape((end - first, H))
            out = attended[m, first * H : end * H].reshape((end - first, H))
            scores = all_scores[: (end - first) * S].reshape((end - first, S))
            _attend_group(keys, values, q, staged, scores, out)
        first = end
