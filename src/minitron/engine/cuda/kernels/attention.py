"""One new token of each row: norms of heads, rotation, its key and value into the cache, and attention over the cached
ones.

The keys of a sequence are split among programs, each of which writes its part of the softmax; a second kernel joins the
parts. A program reads the keys of one key/value head once, for all query heads that share it. Where each row has a slot
of its own, the program of the last part writes the new key and value, and takes them from its registers, so no program
reads what another one writes. Otherwise a kernel before writes those of all rows.

Letters of shapes: M rows, N query heads, K key/value heads, H head_dim, R rotated channels, P parts.
"""

# Kernels are written in a language of their own inside Python, whose constants and tensors type checkers do not know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .products import _INTERPRETED

BLOCK_KEYS = 64
"""Keys that a program reads at a time."""
KEYS_OF_A_PART = 256
"""Keys for each of the programs among which those of a head are split, by arithmetic: not measured on a GPU."""
MOST_PARTS = 32
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _rotated(x, heads, channels, cos, sin, gain, eps, HEAD: tl.constexpr, HALF: tl.constexpr):
    """Channels (C,) of some heads (A,) of one row, normalized if there is a gain, and rotated: (A, C) fp32.

    Args:
        x: to the heads of the row, HEAD channels each.
        cos, sin: to the (HALF,) of its position.
    """
    inside = channels[None, :] < HEAD
    turned = channels < 2 * HALF
    first = channels < HALF
    other = tl.where(first, channels + HALF, tl.where(turned, channels - HALF, channels))
    a = tl.load(x + heads[:, None] * HEAD + channels[None, :], mask=inside, other=0.0)
    b = tl.load(x + heads[:, None] * HEAD + other[None, :], mask=inside, other=0.0)
    if gain is not None:
        scale = 1.0 / tl.sqrt(tl.sum(a * a, axis=1) / HEAD + eps)
        a = a * scale[:, None] * tl.load(gain + channels, mask=channels < HEAD, other=0.0)[None, :]
        b = b * scale[:, None] * tl.load(gain + other, mask=channels < HEAD, other=0.0)[None, :]
    if HALF == 0:
        return a
    angle = tl.where(first, channels, channels - HALF)
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    return a * c[None, :] + b * tl.where(first, -s, s)[None, :]


@triton.jit
def _product(a, b):
    """a (A, C) times the transpose of b (B, C), in fp32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _write(
    qkv,
    keys,
    values,
    cos,
    sin,
    key_gain,
    slots,
    positions,
    slot_stride,
    capacity,
    eps,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The key and value of one row and key/value head into the cache."""
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    channels = tl.arange(0, CHANNELS)
    inside = channels[None, :] < HEAD
    given = qkv + row.to(tl.int64) * (HEADS + 2 * GROUPS) * HEAD
    at = position * HALF
    head_of_key = head + tl.arange(0, 1)
    k = _rotated(given + HEADS * HEAD, head_of_key, channels, cos + at, sin + at, key_gain, eps, HEAD, HALF)
    v = tl.load(given + (HEADS + GROUPS + head) * HEAD + channels[None, :], mask=inside, other=0.0)
    cached = tl.load(slots + row).to(tl.int64) * slot_stride + head.to(tl.int64) * capacity * HEAD
    where = cached + position * HEAD + channels[None, :]
    tl.store(keys + where, k, mask=inside)
    tl.store(values + where, v, mask=inside)


@triton.jit
def _attend(
    qkv,
    keys,
    values,
    cos,
    sin,
    query_gain,
    key_gain,
    slots,
    positions,
    ends,
    sums,
    highest,
    weight,
    slot_stride,
    capacity,
    scale,
    eps,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
    FUSED: tl.constexpr,
):
    """A part of the softmax of one row and key/value head, to `sums` (M, N, P, H), `highest` and `weight` (M, N, P)."""
    row, head, part, parts = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    SHARED: tl.constexpr = HEADS // GROUPS
    position = tl.load(positions + row)
    slot = tl.load(slots + row).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    given = qkv + row.to(tl.int64) * (HEADS + 2 * GROUPS) * HEAD
    cos += position * HALF
    sin += position * HALF
    queries = tl.arange(0, QUERIES)
    # Lines that pad the tile compute the first head again; they are not written.
    heads = head * SHARED + tl.where(queries < SHARED, queries, 0)
    dtype = keys.dtype.element_ty
    q = _rotated(given, heads, channels, cos, sin, query_gain, eps, HEAD, HALF).to(dtype)

    cached = slot * slot_stride + head.to(tl.int64) * capacity * HEAD
    # FUSED: the row's own key is not in the cache yet.
    seen = position if FUSED else tl.load(ends + row)
    blocks = (seen + KEYS - 1) // KEYS
    share = (blocks + parts - 1) // parts * KEYS
    top = tl.full((QUERIES,), _LOWEST, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, CHANNELS), tl.float32)
    end = tl.minimum((part + 1) * share, seen)
    for start in range(part * share, end, KEYS):
        at = start + tl.arange(0, KEYS)
        where = cached + at[:, None] * HEAD + channels[None, :]
        inside = (at[:, None] < end) & (channels[None, :] < HEAD)
        k = tl.load(keys + where, mask=inside, other=0.0)
        scores = tl.where(at[None, :] < end, _product(q, k) * scale, _LOWEST)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.where(at[None, :] < end, tl.exp(scores - new_top[:, None]), 0.0)
        fade = tl.exp(top - new_top)
        v = tl.load(values + where, mask=inside, other=0.0)
        mixed = mixed * fade[:, None] + _product(weights.to(dtype), tl.trans(v))
        total = total * fade + tl.sum(weights, axis=1)
        top = new_top

    if FUSED and part == parts - 1:
        one = tl.arange(0, 1)
        k = _rotated(given + HEADS * HEAD, head + one, channels, cos, sin, key_gain, eps, HEAD, HALF).to(dtype)
        of_value = given + (HEADS + GROUPS + head) * HEAD + channels[None, :]
        v = tl.load(of_value, mask=channels[None, :] < HEAD, other=0.0).to(dtype)
        where = cached + position * HEAD + channels[None, :]
        tl.store(keys + where, k, mask=channels[None, :] < HEAD)
        tl.store(values + where, v, mask=channels[None, :] < HEAD)
        score = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale
        new_top = tl.maximum(top, score)
        fade = tl.exp(top - new_top)
        own = tl.exp(score - new_top)
        mixed = mixed * fade[:, None] + own[:, None] * v.to(tl.float32)
        total = total * fade + own
        top = new_top

    inside = queries < SHARED
    out = ((row * HEADS + heads) * parts + part).to(tl.int64)
    tl.store(highest + out, top, mask=inside)
    tl.store(weight + out, total, mask=inside)
    tl.store(sums + out[:, None] * HEAD + channels[None, :], mixed, mask=inside[:, None] & (channels[None, :] < HEAD))


@triton.jit
def _join(sums, highest, weight, out, parts, HEAD: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """The parts of one row and query head as one softmax, in the dtype of `out` (M, N * H)."""
    at = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    channels = tl.arange(0, CHANNELS)
    there = part < parts
    top = tl.load(highest + at * parts + part, mask=there, other=_LOWEST)
    factor = tl.exp(top - tl.max(top, axis=0))
    total = tl.sum(tl.load(weight + at * parts + part, mask=there, other=0.0) * factor, axis=0)
    inside = there[:, None] & (channels[None, :] < HEAD)
    mixed = tl.load(sums + (at * parts + part[:, None]) * HEAD + channels[None, :], mask=inside, other=0.0)
    found = tl.sum(mixed * factor[:, None], axis=0) / total
    tl.store(out + at * HEAD + channels, found, mask=channels < HEAD)


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots: Tensor,
    positions: Tensor,
    ends: Tensor,
    *,
    span: int,
    own_slots: bool,
    query_gain: Tensor | None = None,
    key_gain: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Attention of M new tokens, whose keys and values go into the cache: (M, N H) in the dtype of the cache.

    Args:
        qkv: (M, (N + 2 K) H) fp32: queries, keys and values, before norms of heads and rotation.
        keys, values: (slots, K, capacity, H), the cache of a layer.
        rotary: cosines and sines (capacity, R / 2) fp32.
        slots: (M,) int64.
        positions: (M,) int64, where the new keys and values go.
        ends: (M,) int64. A row attends to the positions of its slot before this one; position + 1 with `own_slots`.
        span: at least the largest of `ends`; decides among how many programs the keys of a head are split.
        own_slots: no slot is that of two rows.
        query_gain, key_gain: (H,) fp32, of the RMSNorm of heads before rotation, or None.
        eps: of that norm.
    """
    M, width = qkv.shape
    _, groups, capacity, H = keys.shape
    heads = width // H - 2 * groups
    parts = max(1, min(MOST_PARTS, triton.cdiv(span, KEYS_OF_A_PART)))
    shape = {"HEAD": H, "CHANNELS": max(16, triton.next_power_of_2(H))}
    cached = {**shape, "GROUPS": groups, "HEADS": heads, "HALF": rotary[0].shape[1]}
    sums = torch.empty((M, heads, parts, H), dtype=torch.float32, device=qkv.device)
    highest, weight = torch.empty((2, M, heads, parts), dtype=torch.float32, device=qkv.device)
    out = torch.empty((M, heads * H), dtype=keys.dtype, device=qkv.device)
    if not own_slots:
        _write[(M, groups)](
            qkv, keys, values, *rotary, key_gain, slots, positions, keys.stride(0), capacity, eps, **cached
        )
    _attend[(M, groups, parts)](
        qkv, keys, values, *rotary, query_gain, key_gain, slots, positions, ends, sums, highest, weight,
        keys.stride(0), capacity, H**-0.5, eps, **cached,
        QUERIES=max(16, triton.next_power_of_2(heads // groups)), KEYS=BLOCK_KEYS, FUSED=own_slots,
        # More of fp32 fits neither into some shared memories nor into the registers of fewer threads.
        **({"num_stages": 1, "num_warps": 8} if keys.dtype == torch.float32 else {"num_stages": 2}),
    )  # fmt: skip
    _join[(M * heads,)](sums, highest, weight, out, parts, **shape, PARTS=triton.next_power_of_2(parts))
    return out
