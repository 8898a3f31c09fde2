"""What the compiled step is given: tables of addresses and numbers, and how arrays at addresses are read.

Arrays of different layers have different addresses, so layers come as a table of addresses; the Python side
(`engine.cpu.engine`) keeps the arrays alive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit  # type: ignore[reportPrivateImportUsage] (documented as public)
from numba.extending import overload
from numba.np.numpy_support import as_dtype

from .formats import FAST, row_items
from .lanes import pointer

# Columns of the table of layers: addresses, and the two head counts. An address of 0 means that there is none.
GAIN_1, OFFSET_1, GAIN_2, OFFSET_2, QKV_BIAS, O_BIAS, UP_BIAS, DOWN_BIAS = range(8)
Q, K, V, O, UP, DOWN, GATE = range(8, 15)  # noqa: E741 (the usual letters)
EXTRAS = 7
"""Columns from a matrix's address to that of its extras."""
KEYS, VALUES, HEADS, KV_HEADS = range(22, 26)
QUERY_NORM, KEY_NORM, GATE_BIAS = range(26, 29)
LAYER_COLUMNS = 29
# Columns of the table of tensors outside the layers.
EMBED, HEAD, EMBED_EXTRAS, HEAD_EXTRAS, GAIN, OFFSET = range(6)
# Sizes.
HIDDEN, NEURONS, VOCABULARY, HEAD_DIM, CAPACITY, RUN_OF_NEURONS = range(6)
ROUNDED = 6
"""How many of a step's tokens are rounded for `bf16_products`, from the first on; at most one follows them."""
# How memory is read, see `engine.cpu.tuning`; no bit of a result depends on it. FIXED_SHARES is 0 or 1.
FIXED_SHARES, AHEAD, SHORT, PARTS = range(7, 11)
# What a call computes: M, the first token whose logits are needed, and how many further tokens to choose after each,
# each the input of the next step. The call writes to CHOSEN how many it has chosen.
TOKENS, FIRST_LOGITS, MORE, CHOSEN = range(4)
MLP_KIND = 4
"""Index in `kinds`."""
# Counters of the parts of work that threads take as they become free: `threads.take`.
ATTENTION, PROJECTION, MLP, HEAD_ROWS, DOWN_ROWS = (np.int64(counter) for counter in range(5))
# Rows of the mapping of new tokens into the KV cache: their positions, and the slots of their sequences.
POSITIONS, SLOTS = range(2)


# Dtypes of `mlp_kind`.
RELU2, GATED = np.dtype(np.uint8), np.dtype(np.int8)


@njit(**FAST)
def fp32_at(address, rows, columns):  # type: ignore[no-untyped-def]
    """The fp32 array (rows, columns) at an address."""
    return carray(pointer(address), (rows, columns), np.float32)  # type: ignore[call-arg]


def matrix_at(kind: Any, address: int, rows: int, columns: int) -> Any:
    """The matrix at an address, in the format that the dtype of `kind` stands for."""
    raise NotImplementedError("only within compiled code")


@overload(matrix_at)
def _overload_matrix_at(kind, address, rows, columns):  # type: ignore[no-untyped-def]
    dtype = as_dtype(kind.dtype)

    def at(kind, address, rows, columns):  # type: ignore[no-untyped-def]
        return carray(pointer(address), (rows, row_items(kind, columns)), dtype)  # type: ignore[call-arg]

    return at


@njit(**FAST)
def extras_at(address, rows):  # type: ignore[no-untyped-def]
    """The extras of a matrix with so many rows, at an address; empty where that is 0."""
    if address == 0:
        return carray(pointer(address), (0,), np.int32)  # type: ignore[call-arg]
    escapes = carray(pointer(address), (2 * rows + 1,), np.int32)[2 * rows]  # type: ignore[call-arg]
    return carray(pointer(address), (2 * rows + 1 + 2 * escapes,), np.int32)  # type: ignore[call-arg]
