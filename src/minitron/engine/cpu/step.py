"""One decode step of the whole model as one compiled function, which every thread runs on its share of the rows.

The step is compiled for each format of the weights when it is first used: `kind` and `kv_kind`, empty arrays, say by
their dtype how matrices, and keys and values, are stored; that of `mlp_kind` says which MLP is computed (`RELU2` or
`GATED`), and no model pays for the other one. Letters: M new tokens, D hidden, W heads * H, H head_dim, F MLP neurons,
V vocabulary, S positions, T threads. Activations and sums are fp32 throughout; nothing is rounded between layers but
keys and values, and what is multiplied for longer prompts (`bf16_products`).

Every thread keeps a residual stream of its own and adds the same numbers to it, so that a layer has three barriers:
after attention (a thread computes whole groups of heads from their weights to their result, where there are enough
groups), after its projection, and after the MLP. Between barriers a thread takes the next part of the work when it has
finished one, so that a slower core does not hold up the others. Neurons are computed in runs whose sums are added in
order, hence the same bits with any number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload
from numba.np.numpy_support import from_dtype

from . import (
    attention,
    bf16_products,
    choice,
    dots,
    formats,
    gemv,
    lanes,
    mersenne,
    microkernels,
    register_tiles,
    tables,
    tiles,
    unpack,
)
from . import threads as threads_file
from .attention import attend, norm, store_heads
from .compiled import cached, source_digest
from .formats import FAST
from .gemv import ROW_BLOCK, share
from .tables import (
    AHEAD,
    ATTENTION,
    CHOSEN,
    DOWN,
    DOWN_BIAS,
    DOWN_ROWS,
    EMBED,
    EMBED_EXTRAS,
    EXTRAS,
    FIRST_LOGITS,
    FIXED_SHARES,
    GAIN,
    GAIN_1,
    GAIN_2,
    GATE,
    GATE_BIAS,
    GATED,
    HEAD,
    HEAD_DIM,
    HEAD_EXTRAS,
    HEAD_ROWS,
    HEADS,
    HIDDEN,
    KV_HEADS,
    MLP,
    MLP_KIND,
    MORE,
    NEURONS,
    O_BIAS,
    OFFSET,
    OFFSET_1,
    OFFSET_2,
    PARTS,
    POSITIONS,
    PROJECTION,
    QKV_BIAS,
    ROUNDED,
    RUN_OF_NEURONS,
    SHORT,
    TOKENS,
    UP,
    UP_BIAS,
    VOCABULARY,
    O,
    Q,
    extras_at,
    fp32_at,
    matrix_at,
)
from .threads import STOP, TASK, atomic_add, atomic_load, atomic_store, barrier, reset, take, wait_while

_GATED = from_dtype(GATED)
LEAST_PART = 128
"""Rows of a matrix are divided into `sizes[PARTS]` parts for each thread, of at least so many rows."""
FEW = 8
"""Tokens up to which a barrier costs more than threads that wait for one with more heads."""

WHOLE: Any = {**FAST, "inline": "always"}
"""For the functions that make up the step. Not inlined, each would be optimized again in every function that calls it,
and compiling would take a quarter longer."""


@njit(**FAST)
def _multiply(kind, address, extras, rows, x, staged, out, column, start, stop, sizes):  # type: ignore[no-untyped-def]
    """Products with rows `start` to `stop` of the (rows, K) matrix at an address; `staged` is x, see `_stage`."""
    w, escapes = matrix_at(kind, address, rows, x.shape[1]), extras_at(extras, rows)
    if x.shape[0] == 1:
        gemv.staged_matvec(w, escapes, x, staged, out, column, start, stop, sizes[AHEAD], sizes[SHORT])
    else:
        reading = sizes[AHEAD], sizes[SHORT]
        bf16_products.multiply(w, escapes, x, staged, out, column, start, stop, sizes[ROUNDED], *reading)


@njit(**FAST)
def _stage(kind, x, staged, sizes):  # type: ignore[no-untyped-def]
    """Lay out vectors for `_multiply`."""
    bf16_products.stage(kind, x, staged, sizes[ROUNDED] if x.shape[0] > 1 else 0)


@njit(**FAST)
def _next(sync, which, sizes, thread, threads, before, parts):  # type: ignore[no-untyped-def]
    """The part of some work that a thread does after part `before` (-1 if none); `parts` if none is left.

    It is the next free part, or one of the thread's fixed share where parts are so short that taking a free one costs
    more than waiting at the barrier.
    """
    if sizes[FIXED_SHARES] == 0:
        return min(take(sync, which), parts)
    index = parts * thread // threads if before < 0 else before + 1
    return index if index < parts * (thread + 1) // threads else parts


@njit(**FAST)
def _parts(rows, threads, sizes):  # type: ignore[no-untyped-def]
    """Into how many parts the rows of a matrix are divided."""
    return min(sizes[PARTS] * threads, max(threads, rows // LEAST_PART))


@njit(**FAST)
def _add_bias(address, out, start, stop):  # type: ignore[no-untyped-def]
    if address != 0:
        bias = fp32_at(address, 1, stop)[0]
        for m in range(out.shape[0]):
            for c in range(start, stop):
                out[m, c] += bias[c]


@njit(**FAST)
def _add(values, out):  # type: ignore[no-untyped-def]
    for c in range(values.shape[0]):
        out[c] += values[c]


@njit(**FAST)
def _some_heads(group, groups, kinds, sizes, eps, layer, whole, normed, staged, qkv, cos, sin, mapping):  # type: ignore[no-untyped-def]
    """Queries (if `whole`), keys and values of one group of heads; keys and values are stored in the cache."""
    H, column = sizes[HEAD_DIM], 0
    for matrix in range(3):
        heads = layer[HEADS] if matrix == 0 else layer[KV_HEADS]
        if whole or matrix > 0:
            start, stop = heads * H * group // groups, heads * H * (group + 1) // groups
            address, extras = layer[Q + matrix], layer[Q + matrix + EXTRAS]
            _multiply(kinds[0], address, extras, heads * H, normed, staged, qkv, column, start, stop, sizes)
            _add_bias(layer[QKV_BIAS], qkv, column + start, column + stop)
            first, last = (column + start) // H, (column + stop) // H
            store_heads(kinds[1], first, last, sizes, eps, layer, qkv, cos, sin, mapping)
        column += heads * H


@njit(**WHOLE)
def _heads(thread, threads, sync, kinds, sizes, eps, layer, whole, normed, staged, scores, qkv, attended, tables):  # type: ignore[no-untyped-def]
    """Store keys and values of the normed tokens; if `whole`, compute attention too.

    Threads divide groups of heads among them, each from its weights to attention's result. Where there are fewer groups
    than threads or heads have odd sizes, they divide rows, and then heads; so also where many tokens would wait for the
    thread that has a group more than the others.
    """
    (kind, kv_kind), (cos, sin, mapping) = kinds[:2], tables
    N, groups, H = layer[HEADS], layer[KV_HEADS], sizes[HEAD_DIM]
    _stage(kind, normed, staged[0], sizes)
    if H % ROW_BLOCK == 0 and (groups % threads == 0 if qkv.shape[0] > FEW else groups >= threads):
        group = _next(sync, ATTENTION, sizes, thread, threads, -1, groups)
        while group < groups:
            _some_heads(group, groups, kinds, sizes, eps, layer, whole, normed, staged[0], qkv, cos, sin, mapping)
            if whole:
                first, last = N * group // groups, N * (group + 1) // groups
                attend(kv_kind, first, last, sizes, layer, qkv, mapping, staged[1], scores, attended)
            group = _next(sync, ATTENTION, sizes, thread, threads, group, groups)
        barrier(sync, threads)
        return
    column = 0
    for matrix in range(3):
        heads = N if matrix == 0 else groups
        start, stop = share(heads * H, ROW_BLOCK, thread, threads)
        address, extras = layer[Q + matrix], layer[Q + matrix + EXTRAS]
        _multiply(kind, address, extras, heads * H, normed, staged[0], qkv, column, start, stop, sizes)
        _add_bias(layer[QKV_BIAS], qkv, column + start, column + stop)
        column += heads * H
    barrier(sync, threads)
    first, last = share(N + 2 * groups, 1, thread, threads)
    store_heads(kv_kind, first, last, sizes, eps, layer, qkv, cos, sin, mapping)
    barrier(sync, threads)
    if whole:
        first, last = share(N, 1, thread, threads)
        attend(kv_kind, first, last, sizes, layer, qkv, mapping, staged[1], scores, attended)
        barrier(sync, threads)


@njit(**WHOLE)
def _attention(thread, threads, sync, kinds, sizes, eps, layer, whole, scratch, M, cos, sin, mapping):  # type: ignore[no-untyped-def]
    """Add one layer's attention to the residual stream; if not `whole`, only store keys and values."""
    all_x, all_normed, all_staged, all_qkv, all_attended, all_projected = scratch[:6]
    D, H = sizes[HIDDEN], sizes[HEAD_DIM]
    x, staged, projected = all_x[thread, :M], all_staged[thread], all_projected[:M]
    normed = all_normed[thread, :M]
    width, q_width = (layer[HEADS] + 2 * layer[KV_HEADS]) * H, layer[HEADS] * H
    qkv = all_qkv[: M * width].reshape((M, width))
    attended = all_attended[: M * q_width].reshape((M, q_width))
    norm(x, layer[GAIN_1], layer[OFFSET_1], eps, normed)
    scores, tables = scratch[10][thread], (cos, sin, mapping)
    _heads(thread, threads, sync, kinds, sizes, eps, layer, whole, normed, staged, scores, qkv, attended, tables)
    reset(sync, MLP, thread)
    reset(sync, DOWN_ROWS, thread)
    reset(sync, HEAD_ROWS, thread)
    if not whole:
        reset(sync, ATTENTION, thread)
        return
    _stage(kinds[0], attended, staged[0], sizes)
    parts = _parts(D, threads, sizes)
    part = _next(sync, PROJECTION, sizes, thread, threads, -1, parts)
    while part < parts:
        start, stop = share(D, ROW_BLOCK, part, parts)
        _multiply(kinds[0], layer[O], layer[O + EXTRAS], D, attended, staged[0], projected, 0, start, stop, sizes)
        _add_bias(layer[O_BIAS], projected, start, stop)
        part = _next(sync, PROJECTION, sizes, thread, threads, part, parts)
    barrier(sync, threads)
    reset(sync, ATTENTION, thread)
    for m in range(M):
        _add(projected[m], x[m])


def _mlp(
    thread: int, threads: int, sync: Any, kinds: Any, sizes: Any, eps: Any, layer: Any, scratch: Any, M: int, first: int
) -> int:
    """Add one layer's MLP to the residual stream.

    Returns:
        how many neurons of the tokens from `first` on this thread has found not to be zero.
    """
    raise NotImplementedError("only within compiled code")


@overload(_mlp, jit_options=FAST, inline="always")
def _overload_mlp(thread, threads, sync, kinds, sizes, eps, layer, scratch, M, first):  # type: ignore[no-untyped-def]
    return _gated_mlp if kinds[MLP_KIND].dtype == _GATED else _relu2_mlp


def _relu2_mlp(thread, threads, sync, kinds, sizes, eps, layer, scratch, M, first):  # type: ignore[no-untyped-def]
    """`down(relu(up(x)) ** 2)`, reading only rows of `down` whose neurons are not zero."""
    all_x, all_normed, all_staged, _, _, _, all_h, all_active, partial = scratch[:9]
    D, F, run = sizes[HIDDEN], sizes[NEURONS], sizes[RUN_OF_NEURONS]
    x, normed, staged = all_x[thread, :M], all_normed[thread, :M], all_staged[thread]
    h, active = all_h[:M], all_active[:M]
    norm(x, layer[GAIN_2], layer[OFFSET_2], eps, normed)
    down, extras = matrix_at(kinds[0], layer[DOWN], F, D), extras_at(layer[DOWN + EXTRAS], F)
    runs = (F + run - 1) // run
    counted, listed = 0, np.empty(M, np.int64)
    _stage(kinds[0], normed, staged[0], sizes)
    r = _next(sync, MLP, sizes, thread, threads, -1, runs)
    while r < runs:
        start, stop = r * run, min((r + 1) * run, F)
        _multiply(kinds[0], layer[UP], layer[UP + EXTRAS], F, normed, staged[0], h, 0, start, stop, sizes)
        _add_bias(layer[UP_BIAS], h, start, stop)
        for m in range(M):
            listed[m] = gemv.squared_relu_list(h[m], active[m], start, stop)
            partial[r, m, :] = np.float32(0)
            counted += listed[m] if m >= first else 0
        if M == 1:
            gemv.add_rows(down, extras, D, h[0], active[0, start:stop], listed[0], partial[r, 0], sizes[AHEAD])
        else:
            bf16_products.add_rows_of(
                down, extras, D, h, active[:, start:stop], listed, start, stop, staged[1], partial[r], sizes[ROUNDED],
                sizes[AHEAD],
            )  # fmt: skip
        r = _next(sync, MLP, sizes, thread, threads, r, runs)
    barrier(sync, threads)
    reset(sync, PROJECTION, thread)
    _add_bias(layer[DOWN_BIAS], x, 0, D)
    for m in range(M):
        for r in range(runs):
            _add(partial[r, m, :D], x[m])
    return counted


def _gated_mlp(thread, threads, sync, kinds, sizes, eps, layer, scratch, M, first):  # type: ignore[no-untyped-def]
    """`down(silu(gate(x)) * up(x))`: hardly a neuron is zero, so `down` is multiplied by its rows."""
    all_x, all_normed, all_staged, _, _, all_projected, all_h = scratch[:7]
    D, F = sizes[HIDDEN], sizes[NEURONS]
    x, normed, staged = all_x[thread, :M], all_normed[thread, :M], all_staged[thread]
    h, gate, projected = all_h[:M], scratch[11][:M], all_projected[:M]
    norm(x, layer[GAIN_2], layer[OFFSET_2], eps, normed)
    _stage(kinds[0], normed, staged[0], sizes)
    counted, parts = 0, _parts(F, threads, sizes)
    part = _next(sync, MLP, sizes, thread, threads, -1, parts)
    while part < parts:
        start, stop = share(F, ROW_BLOCK, part, parts)
        _multiply(kinds[0], layer[GATE], layer[GATE + EXTRAS], F, normed, staged[0], gate, 0, start, stop, sizes)
        _add_bias(layer[GATE_BIAS], gate, start, stop)
        _multiply(kinds[0], layer[UP], layer[UP + EXTRAS], F, normed, staged[0], h, 0, start, stop, sizes)
        _add_bias(layer[UP_BIAS], h, start, stop)
        for m in range(M):
            gemv.times_silu(gate[m, start:stop], h[m, start:stop])
        counted += (M - first) * (stop - start)
        part = _next(sync, MLP, sizes, thread, threads, part, parts)
    barrier(sync, threads)
    reset(sync, PROJECTION, thread)
    _stage(kinds[0], h, staged[0], sizes)
    parts = _parts(D, threads, sizes)
    part = _next(sync, DOWN_ROWS, sizes, thread, threads, -1, parts)
    while part < parts:
        start, stop = share(D, ROW_BLOCK, part, parts)
        _multiply(kinds[0], layer[DOWN], layer[DOWN + EXTRAS], D, h, staged[0], projected, 0, start, stop, sizes)
        _add_bias(layer[DOWN_BIAS], projected, start, stop)
        part = _next(sync, DOWN_ROWS, sizes, thread, threads, part, parts)
    barrier(sync, threads)
    for m in range(M):
        _add(projected[m], x[m])
    return counted


@njit(**WHOLE)
def _embed(kind, sizes, ends, tokens, x):  # type: ignore[no-untyped-def]
    V, D = sizes[VOCABULARY], sizes[HIDDEN]
    embed, extras = matrix_at(kind, ends[EMBED], V, D), extras_at(ends[EMBED_EXTRAS], V)
    for m in range(x.shape[0]):
        x[m, :] = np.float32(0)
        gemv.add_row(embed, extras, D, tokens[m], np.float32(1), x[m], formats.AHEAD)
        formats.add_escapes(embed, extras, tokens[m], np.float32(1), x[m])


@njit(**FAST)
def _keep(x, first, M):  # type: ignore[no-untyped-def]
    """Move the tokens from `first` on to the beginning; how many there are."""
    for m in range(first if first > 0 else M, M):
        x[m - first, :] = x[m]
    return M - first


@njit(**WHOLE)
def _step(thread, threads, sync, kinds, tokens, mapping, first, sizes, eps, layers, ends, scratch, cos, sin, zeros):  # type: ignore[no-untyped-def]
    """All layers for some tokens, and the logits of those from `first` on."""
    M = tokens.shape[0]
    x, normed = scratch[0][thread, :M], scratch[1][thread, :M]
    _embed(kinds[2], sizes, ends, tokens, x)
    for index in range(layers.shape[0]):
        layer, whole = layers[index], first < M or index + 1 < layers.shape[0]
        _attention(thread, threads, sync, kinds, sizes, eps, layer, whole, scratch, M, cos, sin, mapping)
        if not whole:  # without logits, the last layer's keys and values are all that is needed
            barrier(sync, threads)
            return
        if index + 1 == layers.shape[0]:  # from here on only tokens with logits are needed
            M, first = _keep(x, first, M), np.int64(0)
        zeros[thread, 0] += _mlp(thread, threads, sync, kinds, sizes, eps, layer, scratch, M, first)
    M = _keep(x, first, M) if layers.shape[0] == 0 else M
    x, normed = x[:M], normed[:M]
    norm(x, ends[GAIN], ends[OFFSET], eps, normed)
    rows, logits = sizes[VOCABULARY], scratch[9]
    staged = scratch[2][thread, 0]
    tiles.stage(kinds[3], normed, staged)  # none of them is rounded
    head = (kinds[3], ends[HEAD], ends[HEAD_EXTRAS], rows)
    parts = _parts(rows, threads, sizes)
    part = _next(sync, HEAD_ROWS, sizes, thread, threads, -1, parts)
    while part < parts:
        start, stop = share(rows, ROW_BLOCK, part, parts)
        _multiply(*head, normed, staged, logits[:M], 0, start, stop, sizes)
        part = _next(sync, HEAD_ROWS, sizes, thread, threads, part, parts)
    barrier(sync, threads)


@njit(**WHOLE)
def _decode(thread, threads, sync, kinds, inputs, sizes, eps, layers, ends, scratch, tables):  # type: ignore[no-untyped-def]
    """One call: a step, and then as many steps with chosen tokens as the call asks for."""
    # Arguments are read before the first barrier: once thread 0 has returned, the caller may write the next ones.
    (batch, tokens, mapping, stops, draws), (cos, sin, zeros) = inputs, tables
    M, first, more, drawing = batch[TOKENS], batch[FIRST_LOGITS], batch[MORE], draws[choice.ON] != 0
    new, at, ends_of_text = tokens[:M].copy(), mapping[:, :M].copy(), stops.copy()
    logits, lanes = scratch[9], scratch[2][thread, 0, 0]
    chosen = 0
    while True:
        if drawing and thread == 0:
            choice.prepare(draws)
        _step(thread, threads, sync, kinds, new, at, first, sizes, eps, layers, ends, scratch, cos, sin, zeros)
        if chosen == more:
            return
        # Tokens of a prompt that came before the sequences' last ones have done their part.
        new, at, M, first = new[first:], at[:, first:], M - first, np.int64(0)
        if drawing:
            choice.draw_rows(thread, threads, draws, logits, M, lanes, tokens[chosen * M : (chosen + 1) * M])
            barrier(sync, threads)
        stop, undecided = chosen + 1 == more, False
        # Every thread finds the most probable token itself, so that none waits; logits are next overwritten after a
        # barrier.
        for m in range(M):
            token = tokens[chosen * M + m] if drawing else choice.best(logits[m], lanes)
            at[POSITIONS, m] += 1
            new[m] = token
            for i in range(ends_of_text.shape[0]):
                stop = stop or ends_of_text[i] == token
            undecided = undecided or token == choice.UNDECIDED
            if thread == 0:
                tokens[chosen * M + m] = token
        if layers.shape[0] == 0:  # a step without layers has no barrier before the logits are written
            barrier(sync, threads)
        if undecided:
            if thread == 0:
                draws[choice.LEFT_OPEN] = 1
            return
        chosen += 1
        if thread == 0:
            draws[choice.USED] += draws[choice.PER_STEP]
            batch[CHOSEN] = chosen
        if stop:
            return


def _compiled(digest: int) -> Any:
    def run(
        thread,
        threads,
        sync,
        kinds,
        batch,
        tokens,
        mapping,
        stops,
        draws,
        sizes,
        eps,
        layers,
        ends,
        scratch,
        cos,
        sin,
        zeros,
    ):  # type: ignore[no-untyped-def]
        """Take part in calls. Thread 0 takes part in one and returns; the others wait for the next until told to stop.

        Args:
            thread, threads: index and number. Thread -1 tells the others to stop, and does nothing itself.
            sync: int64 (SYNC_SIZE,), see `engine.cpu.threads`.
            kinds: empty arrays whose dtypes say how a layer's weights, keys and values, embedding and head are stored,
                and which MLP is computed (RELU2 or GATED).
            batch: int64, (TOKENS, ..., CHOSEN).
            tokens: int64, the new tokens; those chosen are written there, M at a time.
            mapping: int64 (2, >= M), the POSITIONS and SLOTS of the new tokens; chosen tokens follow them.
            stops: int64, tokens after which, in any sequence, no more are chosen.
            draws: int64, (ON, ..., FIRST_ROW + M), see `engine.cpu.choice`.
            sizes: int64, (HIDDEN, ..., PARTS).
            eps: of the norms, fp32.
            layers: int64 (layers, LAYER_COLUMNS). ends: int64, (EMBED, ..., OFFSET).
            scratch: see `engine.cpu.engine`.
            cos, sin: fp32 (capacity, R / 2).
            zeros: int64 (threads, 8), the first of each counts active neurons of tokens whose logits are computed.
        """
        if digest == -1:
            return
        if thread < 0:
            atomic_store(sync, STOP, 1)  # type: ignore[call-arg]
        if thread <= 0:
            atomic_add(sync, TASK, 1)  # type: ignore[call-arg]
        done = 0
        while thread >= 0:
            if thread > 0:
                wait_while(sync, TASK, done)
                done += 1
                if atomic_load(sync, STOP) == 1:  # type: ignore[call-arg]
                    return
            inputs = (batch, tokens, mapping, stops, draws)
            _decode(thread, threads, sync, kinds, inputs, sizes, eps, layers, ends, scratch, (cos, sin, zeros))
            if thread == 0:
                return

    return run


SOURCES = (
    attention, bf16_products, choice, dots, formats, gemv, lanes, mersenne, microkernels, register_tiles, tables, tiles,
    threads_file, unpack,
)  # fmt: skip
DIGEST = source_digest(__file__, *SOURCES)
"""The version of the compiled step."""
run = cached(_compiled, __file__, *SOURCES)
