"""Writes a small cache of targets, killed again and again: `small_cache.py FOLDER KIND`.

Each attempt is a fork that kills itself at one of its first steps towards the disk, until one gets through.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from small_run import small_model, small_stream

from minitron.distill.teacher_cache import CachePlan, covered_blocks, make_codec, text_order, write_cache


def small_plan(kind: str, seed: int = 0, blocks: int = 11, **options: int) -> CachePlan:
    """Two blocks per file, so that there are some files."""
    model, stream = small_model(), small_stream()
    codec = make_codec(kind, model, **options)
    order = text_order(stream)
    return CachePlan(codec, "t" * 64, covered_blocks(stream, blocks), order, 16, 50, seed, at_once=2, part_blocks=4)


def _killed_at(step: int, folder: Path, kind: str) -> None:
    left = step

    def tick() -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    sync, replace = os.fsync, Path.replace

    def counted_sync(descriptor: int) -> None:
        tick()  # written, perhaps only a part of it on disk
        if left == 1:  # it dies before the next step, with half of the file on disk
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        sync(descriptor)

    def counted_replace(self: Path, target: Path) -> Path:
        tick()
        done = replace(self, target)
        tick()
        return done

    os.fsync, Path.replace = counted_sync, counted_replace  # type: ignore[assignment]
    write_cache(folder, small_plan(kind), small_stream(), small_model())


if __name__ == "__main__":
    torch.set_num_threads(1)
    attempts = 0
    while True:
        attempts += 1
        child = os.fork()
        if not child:
            _killed_at(attempts % 4 + 1 if attempts < 40 else 10**9, Path(sys.argv[1]), sys.argv[2])
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
    print(f"finished after {attempts} attempts")
