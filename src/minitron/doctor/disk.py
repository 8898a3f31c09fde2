"""Folders that this package and its libraries write to between runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..files.cache_folder import cache_folder
from .finding import Finding

LEAST_FREE = 5e9
"""Bytes of free disk below which converting a model is likely to fail."""


def folders() -> dict[str, tuple[Path, str]]:
    """Name of each cache: its folder, and the variable that moves it."""
    home = Path.home()
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home / ".cache/huggingface") / "hub"
    kernels = os.environ.get("NUMBA_CACHE_DIR") or Path(__file__).parents[1] / "engine" / "cpu" / "__pycache__"
    return {
        "models": (cache_folder(""), "MINITRON_CACHE"),
        "hub": (Path(hub).expanduser(), "HF_HOME"),
        "kernels": (Path(kernels), "NUMBA_CACHE_DIR"),
    }


def caches() -> Finding:
    """Size of each cache, whether it can be written, and the free disk below it."""
    rows: dict[str, Any] = {}
    advice = []
    for name, (folder, variable) in folders().items():
        size, files = _size(folder)
        writable, free = _writable(folder), _free(folder)
        rows[name] = {"folder": str(folder), "bytes": size, "files": files, "writable": writable, "free": free}
        if not writable:
            advice.append(f"{folder} cannot be written. Set {variable} to a folder that can.")
        elif free is not None and free < LEAST_FREE:
            advice.append(f"The disk of {folder} has {free / 1e9:.1f} GB free. Set {variable} to a larger one.")
    if not any(Path(rows["kernels"]["folder"]).rglob("*.nbi")):
        advice.append("The kernels are not compiled yet: the first generation compiles them, once.")
    text = "; ".join(f"{name} {row['folder']} ({row['bytes'] / 1e6:,.0f} MB)" for name, row in rows.items())
    poor = any(not row["writable"] or (row["free"] or LEAST_FREE) < LEAST_FREE for row in rows.values())
    return Finding("caches", "note" if poor else "ok", text, rows, tuple(advice))


def _size(folder: Path) -> tuple[int, int]:
    """Bytes and number of the files in a folder. Links are not followed; files that vanish are not counted."""
    total = count = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
                count += 1
            except OSError:
                continue
    return total, count


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next((each for each in (folder, *folder.parents) if each.exists()), folder)


def _writable(folder: Path) -> bool:
    there = _existing(folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(_existing(folder)).free
    except OSError:
        return None
