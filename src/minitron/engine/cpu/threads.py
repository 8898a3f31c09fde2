"""How the threads of a decode step wait for each other: atomics on an int64 array, in compiled code.

A step of a small model takes a tenth of a millisecond and has some twenty-five barriers; a thread pool's fork and
join cost more than the work between them. Here each thread runs the whole step and waits by spinning, then by
yielding, then by sleeping, so that a core that has other work gets to it.
"""

from __future__ import annotations

import os
import platform
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Places in the int64 array, a cache line and its neighbour apart.
ARRIVED, PHASE, TASK, STOP = 0, 16, 32, 48
PARTS = 64
"""The first of four counters of parts of work that were taken, see `take`."""
SYNC_SIZE = PARTS + 4 * 16

SPINS, YIELDS = 400_000, 2_000
"""Looks before yielding (some 5 ms), and yields before sleeping. Who yields to a busy program loses its turn."""
SLEEP_MICROSECONDS = 200

_POSIX = os.name == "posix"
_X86 = platform.machine().lower() in ("x86_64", "amd64")

_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


def _place(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    kind = signature.args[0]
    array = context.make_array(kind)(context, builder, args[0])
    return cgutils.get_item_pointer(context, builder, kind, array, [args[1]], wraparound=False)


@intrinsic
def atomic_load(typingctx, sync, index):  # type: ignore[no-untyped-def]
    """`sync[index]`, and everything that was written before the store that it sees."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_place(context, builder, signature, args), "acquire", 8)

    return types.int64(sync, types.intp), codegen


@intrinsic
def atomic_store(typingctx, sync, index, value):  # type: ignore[no-untyped-def]
    """`sync[index] = value`, after everything that was written before."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store_atomic(args[2], _place(context, builder, signature, args), "release", 8)
        return context.get_dummy_value()

    return types.void(sync, types.intp, types.int64), codegen


@intrinsic
def atomic_add(typingctx, sync, index, value):  # type: ignore[no-untyped-def]
    """`sync[index] += value`; the value before."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", _place(context, builder, signature, args), args[2], "acq_rel")

    return types.int64(sync, types.intp, types.int64), codegen


@intrinsic
def _pause(typingctx):  # type: ignore[no-untyped-def]
    """Tell an x86 core that this is a spin loop, which leaves the other hyperthread its share."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@njit(nogil=True)
def wait_while(sync, place, value):  # type: ignore[no-untyped-def]
    """Return when `sync[place]` is no longer `value`."""
    looks = 0
    while atomic_load(sync, place) == value:  # type: ignore[call-arg]
        looks += 1
        if looks < SPINS or not _POSIX:
            _pause()  # type: ignore[call-arg]
        elif looks < SPINS + YIELDS:
            _sched_yield()
        else:
            _usleep(SLEEP_MICROSECONDS)


@njit(nogil=True)
def barrier(sync, threads):  # type: ignore[no-untyped-def]
    """Return when all threads have come here; what they wrote before is then seen by all."""
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
    """The next part of some work that threads share as they are free: 0, 1, 2, ...

    `which` of the counters; one that all threads have done with must be set back (`untake`) between the barriers after
    that work and before its next turn.
    """
    return atomic_add(sync, PARTS + 16 * which, 1)  # type: ignore[call-arg]


@njit(nogil=True)
def untake(sync, which, thread):  # type: ignore[no-untyped-def]
    """Begin with part 0 again; see `take`."""
    if thread == 0:
        atomic_store(sync, PARTS + 16 * which, 0)  # type: ignore[call-arg]
