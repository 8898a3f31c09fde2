"""How much memory this process may still take: the one probe that everything that plans with memory asks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
"""Where /proc and /sys are."""
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_VERSION_2 = ("memory.max", "memory.current")


def available_memory() -> int | None:
    """Bytes that this process may still take: the least of what the machine and its control groups have left.

    Pages of the file cache count as free: the kernel gives them back under pressure. None where nothing is known.
    """
    left = [_left_of_machine(), *(_left_of_group(*group) for group in _control_groups())]
    return min((bytes for bytes in left if bytes is not None), default=None)


def _left_of_machine() -> int | None:
    try:
        lines = (ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    return total_memory()  # nothing tells what is in use


def total_memory() -> int | None:
    """Bytes of memory of the machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _control_groups() -> Iterator[tuple[Path, str, str]]:
    """(folder, file of the limit, file of the usage) of the process's control groups and of those around them.

    Version 2 has one tree; version 1 has a tree for each controller, of which only that of memory matters. In a
    container the path may be that of the host, of which only the top is visible: folders that do not exist are
    harmless.
    """
    try:
        lines = (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top = ROOT / "sys/fs/cgroup" / controllers
        limit, usage = _VERSION_1 if controllers else _VERSION_2
        # A process outside the root of its namespace has a path with "..", of which nothing can be seen.
        names = [] if ".." in path.split("/") else [name for name in path.split("/") if name]
        for depth in range(len(names), -1, -1):
            yield top.joinpath(*names[:depth]), limit, usage


def _left_of_group(folder: Path, limit: str, usage: str) -> int | None:
    """The limit less the usage, plus the file cache that counts as used; None without a limit or a controller."""
    try:
        most = int((folder / limit).read_text(encoding="ascii"))
        used = int((folder / usage).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        # Usage includes the groups below; so do the totals of version 1 and the plain numbers of version 2.
        cached = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError):  # "max" is not a number
        return None
    return max(0, most - used + cached)
