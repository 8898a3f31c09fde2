"""Whether a model fits into memory, said before it is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from ..config import NemotronConfig
from .quantize import FORMATS, PLAIN
from .weights import packed_bytes

ROOT = Path("/")
"""Where /proc and /sys are."""


def available_memory() -> int | None:
    """Bytes that this process may still take: of the machine and of its control groups, whichever is least.

    None where neither is known.
    """
    found = [left for left in (_left_of_machine(), *_left_of_groups()) if left is not None]
    return min(found, default=None)


def _left_of_machine() -> int | None:
    try:
        lines = (ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # all there is; what is left is not told
    except (AttributeError, ValueError, OSError):
        return None


def _left_of_groups() -> list[int | None]:
    """Of the process's own group and those above it (version 2), and of version 1's memory controller."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = ROOT / "sys/fs/cgroup" / controllers
        names = ("memory.max", "memory.current") if not controllers else _VERSION_1
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == top.parent:
                break
            left.append(_left_of_group(folder, *names))
    return left


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _left_of_group(folder: Path, limit: str, used: str) -> int | None:
    try:
        most = int((folder / limit).read_text())
        taken = int((folder / used).read_text())
        # Files in the page cache are counted as used, and are given back when memory is wanted.
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, most - taken + int(facts.get("inactive_file", facts.get("total_inactive_file", 0))))
    except (OSError, ValueError):  # no limit ("max"), or no such controller
        return None


def require_memory(name: str, config: NemotronConfig, format: str, packed: bool) -> None:
    """Refuse a model that does not fit.

    Args:
        name: of the model, for the message.
        config: its shape.
        format: in which it shall be loaded: one of `engine.quantize.FORMATS`, or "fp16".
        packed: as `EngineWeights` alone; otherwise as a model of torch, whose transposed matrices come on top when it
            decodes.

    Raises:
        ValueError: it needs more than there is; the message says what would fit.
    """
    left = available_memory()
    needed = packed_bytes(config, format) if packed else config.num_parameters() * PLAIN[format].itemsize  # type: ignore[arg-type]
    if left is None or needed <= left:
        return
    sizes = {other: packed_bytes(config, other) for other in FORMATS}
    fitting = [f"{other} ({_gb(size)})" for other, size in sizes.items() if size <= left]
    least = min(sizes, key=sizes.__getitem__)
    advice = (
        f"with --format {', '.join(fitting)} it would fit"
        if fitting
        else f"no format fits, the smallest ({least}) takes {_gb(sizes[least])}"
    )
    raise ValueError(f"{name} takes {_gb(needed)} of memory in {format}, and {_gb(left)} are free; {advice}")


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
