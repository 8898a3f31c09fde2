"""One decode step of the whole model as one compiled function, which every thread runs on its share of the rows.

Arrays of different layers have different addresses, so layers come as a table of addresses; the Python side
(`engine.cpu`) keeps the arrays alive. Letters: M new tokens, D hidden, W heads * H, H head_dim, F MLP neurons,
V vocabulary, S positions, T threads. Activations and sums are fp32 throughout; nothing is rounded between layers but
the keys and values, which the cache holds in the weights' dtype.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, njit, types  # type: ignore[reportPrivateImportUsage] (documented as public)
from numba.core import cgutils
from numba.extending import intrinsic

from ..ops import gemv
from ..ops.gemv import FAST, NEURON_BLOCK, ROW_BLOCK, bf16_of_float, exp_of, matvec, share, widen
from . import threads as threads_file
from .threads import STOP, TASK, atomic_add, atomic_load, atomic_store, barrier, wait_while

# Columns of the table of layers: addresses, and the two head counts. A bias address of 0 means none.
GAIN_1, OFFSET_1, GAIN_2, OFFSET_2, QKV_BIAS, O_BIAS, UP_BIAS, DOWN_BIAS = range(8)
Q, K, V, O, UP, DOWN, KEYS, VALUES, HEADS, KV_HEADS = range(8, 18)  # noqa: E741 (the usual letters)
LAYER_COLUMNS = 18
# Columns of the table of what is not in a layer.
EMBED, HEAD, GAIN, OFFSET = range(4)
# Sizes.
HIDDEN, NEURONS, VOCABULARY, HEAD_DIM, CAPACITY, IS_BF16 = range(6)
# What the next step shall do: M, the position of the first new token, and the first token whose logits are wanted.
TOKENS, POSITION, FIRST_LOGITS = range(3)

COLUMN_UNIT = 32
"""Columns of the residual stream are shared among threads in runs of this many: a cache line of bf16 weights."""


@intrinsic
def _pointer(typingctx, address):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@njit(**FAST)
def _bf16_at(address, rows, columns):  # type: ignore[no-untyped-def]
    return carray(_pointer(address), (rows, columns), np.uint16)  # type: ignore[call-arg]


@njit(**FAST)
def _fp32_at(address, rows, columns):  # type: ignore[no-untyped-def]
    return carray(_pointer(address), (rows, columns), np.float32)  # type: ignore[call-arg]


@njit(**FAST)
def _multiply(is_bf16, address, rows, x, out, column, start, stop):  # type: ignore[no-untyped-def]
    """`matvec` with the (rows, K) matrix at an address."""
    if is_bf16:
        matvec(_bf16_at(address, rows, x.shape[1]), x, out, column, start, stop)
    else:
        matvec(_fp32_at(address, rows, x.shape[1]), x, out, column, start, stop)


@njit(**FAST)
def _add_bias(address, out, start, stop):  # type: ignore[no-untyped-def]
    if address != 0:
        bias = _fp32_at(address, 1, out.shape[1])[0]
        for m in range(out.shape[0]):
            for c in range(start, stop):
                out[m, c] += bias[c]


@njit(**FAST)
def _layer_norm(x, gain_at, offset_at, eps, out):  # type: ignore[no-untyped-def]
    """Normalize the rows of x (M, D) into `out`; `gain` is 1 + the stored weight."""
    D = x.shape[1]
    gain, offset = _fp32_at(gain_at, 1, D)[0], _fp32_at(offset_at, 1, D)[0]
    for m in range(x.shape[0]):
        row, normed = x[m], out[m]
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
    """Turn the first channels of one head (H,) in place; cos and sin are (R / 2,)."""
    half = cos.shape[0]
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = b * cos[i] + a * sin[i]


@njit(**FAST)
def _place_heads(thread, threads, sizes, layer, qkv, cos, sin, position):  # type: ignore[no-untyped-def]
    """Rotate queries and keys of this thread's heads in place, and put keys and values into the cache."""
    N, groups, H, capacity = layer[HEADS], layer[KV_HEADS], sizes[HEAD_DIM], sizes[CAPACITY]
    first, last = share(N + 2 * groups, 1, thread, threads)
    for m in range(qkv.shape[0]):
        at = position + m
        for n in range(first, last):
            head = qkv[m, n * H : (n + 1) * H]
            if n < N + groups:
                _rotate(head, cos[at], sin[at])
            if n >= N:
                address = layer[KEYS] if n < N + groups else layer[VALUES]
                row = ((n - N) % groups) * capacity + at
                if sizes[IS_BF16]:
                    cached16 = _bf16_at(address, groups * capacity, H)[row]
                    for i in range(H):
                        cached16[i] = bf16_of_float(head[i])
                else:
                    cached32 = _fp32_at(address, groups * capacity, H)[row]
                    for i in range(H):
                        cached32[i] = head[i]


@njit(**FAST)
def _attend_group(keys, values, q, scores, out):  # type: ignore[no-untyped-def]
    """Query heads q (G, H), already scaled, that share keys and values (S, H); scores (G, S) is scratch, out (G, H)."""
    S = keys.shape[0]
    matvec(keys, q, scores, 0, 0, S)
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
def _attend(thread, threads, sizes, layer, qkv, position, scratch, attended):  # type: ignore[no-untyped-def]
    """Attention of this thread's query heads for every new token: qkv (M, all heads * H) to attended (M, N * H)."""
    N, groups, H, capacity = layer[HEADS], layer[KV_HEADS], sizes[HEAD_DIM], sizes[CAPACITY]
    each = N // groups
    scaling = np.float32(1.0 / np.sqrt(H))
    first, last = share(N, 1, thread, threads)
    while first < last:
        group = first // each
        end = min((group + 1) * each, last)
        rows = slice(group * capacity, (group + 1) * capacity)
        for m in range(qkv.shape[0]):
            S = position + m + 1
            flat = qkv[m, first * H : end * H]
            for i in range(flat.shape[0]):
                flat[i] *= scaling
            q = flat.reshape((end - first, H))
            out = attended[m, first * H : end * H].reshape((end - first, H))
            scores = scratch[: (end - first) * S].reshape((end - first, S))
            if sizes[IS_BF16]:
                keys16 = _bf16_at(layer[KEYS], groups * capacity, H)[rows]
                values16 = _bf16_at(layer[VALUES], groups * capacity, H)[rows]
                _attend_group(keys16[:S], values16[:S], q, scores, out)
            else:
                keys32 = _fp32_at(layer[KEYS], groups * capacity, H)[rows]
                values32 = _fp32_at(layer[VALUES], groups * capacity, H)[rows]
                _attend_group(keys32[:S], values32[:S], q, scores, out)
        first = end


@njit(**FAST)
def _attention(thread, threads, sync, sizes, eps, layer, x, normed, qkv_space, attended_space, scratch, cos, sin, at):  # type: ignore[no-untyped-def]
    """Add one layer's attention to the residual stream x (M, D); `at` is the position of the first new token."""
    M, D, H, is_bf16 = x.shape[0], sizes[HIDDEN], sizes[HEAD_DIM], sizes[IS_BF16]
    q_width, kv_width = layer[HEADS] * H, layer[KV_HEADS] * H
    width = q_width + 2 * kv_width
    qkv = qkv_space[: M * width].reshape((M, width))
    attended = attended_space[: M * q_width].reshape((M, q_width))

    _layer_norm(x, layer[GAIN_1], layer[OFFSET_1], eps, normed)
    column = 0
    for matrix in range(3):
        rows = q_width if matrix == 0 else kv_width
        start, stop = share(rows, ROW_BLOCK, thread, threads)
        _multiply(is_bf16, layer[Q + matrix], rows, normed, qkv, column, start, stop)
        _add_bias(layer[QKV_BIAS], qkv, column + start, column + stop)
        column += rows
    barrier(sync, threads)
    _place_heads(thread, threads, sizes, layer, qkv, cos, sin, at)
    barrier(sync, threads)
    _attend(thread, threads, sizes, layer, qkv, at, scratch, attended)
    barrier(sync, threads)
    start, stop = share(D, ROW_BLOCK, thread, threads)
    _multiply(is_bf16, layer[O], D, attended, normed, 0, start, stop)
    _add_bias(layer[O_BIAS], normed, start, stop)
    for m in range(M):
        for c in range(start, stop):
            x[m, c] += normed[m, c]
    barrier(sync, threads)


@njit(**FAST)
def _mlp(thread, threads, sync, sizes, eps, layer, x, normed, h, active, counts):  # type: ignore[no-untyped-def]
    """Add one layer's MLP to the residual stream x (M, D), reading only the rows of neurons that are not zero."""
    D, F = sizes[HIDDEN], sizes[NEURONS]
    _layer_norm(x, layer[GAIN_2], layer[OFFSET_2], eps, normed)
    start, stop = share(F, NEURON_BLOCK, thread, threads)
    _multiply(sizes[IS_BF16], layer[UP], F, normed, h, 0, start, stop)
    _add_bias(layer[UP_BIAS], h, start, stop)
    gemv.squared_relu_lists(h, active, counts, start, stop)
    barrier(sync, threads)
    start, stop = share(D, COLUMN_UNIT, thread, threads)
    _add_bias(layer[DOWN_BIAS], x, start, stop)
    if sizes[IS_BF16]:
        gemv.down(_bf16_at(layer[DOWN], F, D), h, active, counts, x, start, stop)
    else:
        gemv.down(_fp32_at(layer[DOWN], F, D), h, active, counts, x, start, stop)
    barrier(sync, threads)


@njit(**FAST)
def _embed(sizes, ends, tokens, x):  # type: ignore[no-untyped-def]
    V, D = sizes[VOCABULARY], sizes[HIDDEN]
    for m in range(x.shape[0]):
        if sizes[IS_BF16]:
            row16 = _bf16_at(ends[EMBED], V, D)[tokens[m]]
            for c in range(D):
                x[m, c] = widen(row16[c])
        else:
            row32 = _fp32_at(ends[EMBED], V, D)[tokens[m]]
            for c in range(D):
                x[m, c] = row32[c]


@njit(**FAST)
def _step(thread, threads, sync, job, tokens, sizes, eps, layers, ends, spaces, cos, sin, zeros):  # type: ignore[no-untyped-def]
    """All layers and the head for the `job`; see `run` for the arguments."""
    all_x, all_normed, qkv, attended, all_h, all_active, all_counts, logits, scratch = spaces
    M, position = job[TOKENS], job[POSITION]
    x, normed = all_x[:M], all_normed[thread][:M]
    h, active, counts = all_h[:M], all_active[:M], all_counts[:M]
    for index in range(layers.shape[0]):
        layer = layers[index]
        _attention(
            thread, threads, sync, sizes, eps, layer, x, normed, qkv, attended, scratch[thread], cos, sin, position
        )
        _mlp(thread, threads, sync, sizes, eps, layer, x, normed, h, active, counts)
        if thread == 0 and job[FIRST_LOGITS] < M:
            # The lists are next written after two barriers more, so they may still be read here.
            zeros[0] += counts.sum()
            zeros[1] += M * sizes[NEURONS]
    first = job[FIRST_LOGITS]
    _layer_norm(x[first:], ends[GAIN], ends[OFFSET], eps, normed[first:])
    start, stop = share(sizes[VOCABULARY], ROW_BLOCK, thread, threads)
    _multiply(sizes[IS_BF16], ends[HEAD], sizes[VOCABULARY], normed[first:], logits[first:M], 0, start, stop)
    barrier(sync, threads)


def _sources_digest() -> int:
    """Changes with every source line of the compiled code."""
    files = (Path(__file__), Path(gemv.__file__), Path(threads_file.__file__))
    return zlib.crc32(b"".join(file.read_bytes() for file in files))


def _compiled(digest: int) -> Any:
    # Numba looks only at the file of a cached function, and at the values of its closure: the latter carry the digest
    # of everything that is compiled into it.
    def run(thread, threads, sync, job, tokens, sizes, eps, layers, ends, spaces, cos, sin, zeros):  # type: ignore[no-untyped-def]
        """Take part in steps. Thread 0 does one and returns; the others do one after the other until told to stop.

        Args:
            thread, threads: which of how many. Thread -1 tells the others to stop, and does nothing itself.
            sync: int64 (SYNC_SIZE,), see `engine.threads`.
            job: int64, (TOKENS, POSITION, FIRST_LOGITS).
            tokens: int64 (>= M,).
            sizes: int64, (HIDDEN, ..., IS_BF16).
            eps: of the norms, fp32.
            layers: int64 (layers, LAYER_COLUMNS). ends: int64, (EMBED, ..., OFFSET).
            spaces: scratch, see `engine.cpu`.
            cos, sin: fp32 (capacity, R / 2).
            zeros: int64, (active neurons, all neurons), added up over steps whose logits are wanted.
        """
        if digest == -1:
            return
        if thread <= 0:
            if thread == 0:
                _embed(sizes, ends, tokens, spaces[0][: job[TOKENS]])
            else:
                atomic_store(sync, STOP, 1)  # type: ignore[call-arg]
            atomic_add(sync, TASK, 1)  # type: ignore[call-arg]
            if thread == 0:
                _step(thread, threads, sync, job, tokens, sizes, eps, layers, ends, spaces, cos, sin, zeros)
            return
        done = 0
        while True:
            wait_while(sync, TASK, done)
            done += 1
            if atomic_load(sync, STOP) == 1:  # type: ignore[call-arg]
                return
            _step(thread, threads, sync, job, tokens, sizes, eps, layers, ends, spaces, cos, sin, zeros)

    try:
        return njit(cache=True, **FAST)(run)
    except RuntimeError:  # no folder that may be written to: compiled anew in each process
        return njit(**FAST)(run)


run = _compiled(_sources_digest())
