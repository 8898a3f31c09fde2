"""How the threads of a decode step wait for each other: atomics on an int64 array, in compiled code.

A step of a small model takes a tenth of a millisecond and has some twenty-five barriers; the fork and join of a thread
pool would cost more than the work between them. So each thread runs the whole step, and waits by spinning, then by
yielding, then by sleeping, which leaves the core to other programs.
"""

from __future__ import annotations

import os
import platform
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Indices of the int64 array, two cache lines apart.
ARRIVED, PHASE, TASK, STOP = 0, 16, 32, 48
PARTS = 64
"""The first of five counters of parts of work that threads have taken, see `take`."""
SYNC_SIZE = PARTS + 5 * 16

SPINS, YIELDS = 400_000, 2_000
"""Polls before yielding (some 5 ms), and yields before sleeping. A thread that yields loses its turn."""
SLEEP_MICROSECONDS = 200

_POSIX = os.name == "posix"
_X86 = platform.machine().lower() in ("x86_64", "amd64")

_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


def _address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    kind = signature.args[0]
    array = context.make_array(kind)(context, builder, args[0])
    return cgutils.get_item_pointer(context, builder, kind, array, [args[1]], wraparound=False)


@intrinsic
def atomic_load(typingctx, sync, index):  # type: ignore[no-untyped-def]
    """`sync[index]`; also makes visible everything written before the store whose value it reads."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_address(context, builder, signature, args), "acquire", 8)

    return types.int64(sync, types.intp), codegen


@intrinsic
def atomic_store(typingctx, sync, index, value):  # type: ignore[no-untyped-def]
    """`sync[index] = value`, ordered after all earlier writes."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store_atomic(args[2], _address(context, builder, signature, args), "release", 8)
        return context.get_dummy_value()

    return types.void(sync, types.intp, types.int64), codegen


@intrinsic
def atomic_add(typingctx, sync, index, value):  # type: ignore[no-untyped-def]
    """`sync[index] += value`; returns the old value."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", _address(context, builder, signature, args), args[2], "acq_rel")

    return types.int64(sync, types.intp, types.int64), codegen


@intrinsic
def _pause(typingctx):  # type: ignore[no-untyped-def]
    """Tell an x86 core that this is a spin loop, so that the other hyperthread gets its share."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@njit(nogil=True)
def wait_while(sync, index, value):  # type: ignore[no-untyped-def]
    """Return when `sync[index]` is no longer `value`."""
    polls = 0
    while atomic_load(sync, index) == value:  # type: ignore[call-arg]
        polls += 1
        if polls < SPINS or not _POSIX:
            _pause()  # type: ignore[call-arg]
        elif polls < SPINS + YIELDS:
            _sched_yield()
        else:
            _usleep(SLEEP_MICROSECONDS)


@njit(nogil=True)
def barrier(sync, threads):  # type: ignore[no-untyped-def]
    """Return when all threads have arrived; each then sees what the others wrote before."""
    if threads == 1:
        return
    phase = atomic_load(sync, PHASE)  # type: ignore[call-arg]
    if atomic_add(sync, ARRIVED, 1) == threads - 1:  # type: ignore[call-arg]
        atomic_store(sync, ARRIVED, 0)  # type: ignore[call-arg]
        atomic_store(sync, PHASE, phase + 1)  # type: ignore[call-arg]
    else:
        wait_while(sync, PHASE, phase)


@njit(nogil=True)
def take(sync, which):  # type: ignore[no-untyped-def]
    """The next part of some work that no thread has taken yet: 0, 1, 2, ...

    `which` is the counter. It must be set back (`reset`) between the barrier after that work and the barrier before the
    counter is used again.
    """
    return atomic_add(sync, PARTS + 16 * which, 1)  # type: ignore[call-arg]


@njit(nogil=True)
def reset(sync, which, thread):  # type: ignore[no-untyped-def]
    """Let a counter begin with part 0 again; see `take`."""
    if thread == 0:
        atomic_store(sync, PARTS + 16 * which, 0)  # type: ignore[call-arg]
