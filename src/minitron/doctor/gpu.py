"""GPUs, their driver, and whether the installed torch can use them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .finding import Finding
from .packages import installed

SECONDS = 10
"""The longest time that a driver's program may take to answer."""


def torch_build() -> str | None:
    """What the installed torch was built for, read without importing it: cuda 12.8, rocm 6.4, cpu. None: no torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    for name, shown in (("cuda", "cuda"), ("hip", "rocm")):
        version = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        if version:
            return f"{shown} {version[1]}"
    return "cpu"


def gpu(driver: bool) -> Finding:
    """The GPUs that the driver lists.

    Args:
        driver: whether files of a driver are there.
    """
    build, triton = torch_build(), installed("triton")
    cards = _nvidia() if driver else []
    facts = {"driver": driver, "devices": cards, "torch_build": build, "triton": triton}
    if not driver:
        return Finding("gpu", "ok", f"none; torch is built for {build or 'nothing: it is missing'}", facts)
    names = ", ".join(f"{card['name']} ({card['memory_mib'] / 1024:.0f} GiB)" for card in cards)
    text = f"{names or 'a driver, and no device that nvidia-smi lists'}; torch is built for {build}"
    if build in ("cpu", None):
        advice = (
            "This torch cannot use the GPU. Install a build of torch for it: https://pytorch.org/get-started/locally"
        )
        return Finding("gpu", "note", text, facts, (advice,))
    if not cards and str(build).startswith("cuda"):
        advice = "nvidia-smi lists no device. In a container, start it with access to the GPUs (--gpus all)."
        return Finding("gpu", "note", text, facts, (advice,))
    if triton is None:
        advice = "Triton is missing, so the kernels for GPUs cannot be compiled: pip install 'minitron[gpu]'"
        return Finding("gpu", "note", text, facts, (advice,))
    return Finding("gpu", "ok", text, facts)


def _nvidia() -> list[dict[str, Any]]:
    """Name, memory and driver of each device; empty where nvidia-smi does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [
        {"name": row[0], "memory_mib": int(row[1]), "driver": row[2]}
        for row in rows
        if len(row) == 3 and row[1].isdigit()
    ]
