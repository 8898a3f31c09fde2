"""Processor, cores, memory and the rate at which memory is read."""

from __future__ import annotations

import math
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import memory as free_memory
from .finding import Finding

ROOT = Path("/")
"""Where /proc and /sys are."""

FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avxvnni", "avx512vnni", "avx512bf16", "amx-bf16", "amx-int8"),
    *("neon", "dotprod", "bf16", "i8mm", "sve"),
)
"""LLVM's names of the features that the compiled kernels can use."""

BANDWIDTH_BYTES = 1 << 28
"""Read once per measurement; more than the caches of a laptop, and read in a tenth of a second."""
MODEL_SHARE = 0.8
"""Share of the free memory that weights may take; the rest is for the KV cache and Python."""


def processor() -> Finding:
    """Name and vector instructions."""
    from llvmlite import binding

    known = binding.get_host_cpu_features()
    found = [name for name in FEATURES if known.get(name)]
    name = _processor_name()
    facts = {"name": name, "architecture": platform.machine(), "features": found, "llvm": binding.get_host_cpu_name()}
    text = f"{name}, {', '.join(found) or 'no vector instructions that the kernels know'}"
    if platform.machine().lower() in ("x86_64", "amd64") and "avx2" not in found:
        advice = "Without AVX2 the compiled kernels are slow. In a virtual machine, pass the host's processor through."
        return Finding("processor", "note", text, facts, (advice,))
    return Finding("processor", "ok", text, facts)


def _processor_name() -> str:
    try:
        lines = (ROOT / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores() -> Finding:
    """Cores of the machine, those of this process, and what limits them."""
    total, usable, quota = os.cpu_count() or 1, usable_cores(), _quota()
    threads = os.environ.get("OMP_NUM_THREADS")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts = {"logical": total, "usable": usable, "quota": quota, "omp_num_threads": threads, "load": load}
    text = f"{usable} of {total} logical processors"
    advice = []
    if quota is not None and quota < usable:
        text += f", limited to the time of {quota:g}"
        advice.append(
            f"This control group gets the time of {quota:g} processors. More threads than that wait for each other: "
            f"set OMP_NUM_THREADS={max(1, math.floor(quota))}."
        )
    if threads is not None:
        text += f", OMP_NUM_THREADS={threads}"
        if not threads.isdigit() or int(threads) < 1:
            advice.append(f"OMP_NUM_THREADS is {threads!r}; it must be a number of at least 1.")
    if load is not None:
        text += f", load {load:.1f}"
        if load > 0.5 * usable + 0.5:
            advice.append("Other programs are running. Speeds measured now are too low.")
    return Finding("cores", "note" if advice else "ok", text, facts, tuple(advice))


def _quota() -> float | None:
    """Processors whose time the control group of a container may use (version 2), None without a limit."""
    try:
        limit, period = (ROOT / "sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return int(limit) / int(period)
    except (OSError, ValueError):  # "max" is not a number
        return None


def memory() -> Finding:
    """Total and free memory, and the largest model that fits in each format."""
    free, total = free_memory.available_memory(), free_memory.total_memory()
    if free is None:
        return Finding("memory", "unknown", "the free memory is not known", {"total": total, "free": None})
    fits = {name: free * MODEL_SHARE / size for name, size in (("bf16", 2.0), ("int8", 1.0625), ("int4", 0.5625))}
    facts = {"total": total, "free": free, "parameters_that_fit": {name: round(n) for name, n in fits.items()}}
    of = f" of {total / 1e9:.1f} GB" if total else ""
    sizes = ", ".join(f"{count / 1e9:.1f}B in {name}" for name, count in fits.items())
    text = f"{free / 1e9:.1f} GB free{of}; room for {sizes}"
    if free < 2e9:
        advice = "Importing torch and transformers alone takes half a gigabyte. End other programs first."
        return Finding("memory", "note", text, facts, (advice,))
    return Finding("memory", "ok", text, facts)


def bandwidth() -> Finding:
    """The rate at which all usable cores together read memory: the limit of decoding one text."""
    rate = _read_rate(usable_cores())
    facts = {"read_gb_per_s": round(rate, 1), "bytes": BANDWIDTH_BYTES}
    text = f"{rate:.1f} GB/s read: at most {rate:.0f} tokens/s where a token reads 1 GB of weights"
    return Finding("bandwidth", "ok", text, facts)


def _read_rate(threads: int, repeats: int = 4) -> float:
    """GB/s, the best of some sums. numpy releases the interpreter's lock while it sums."""
    import numpy as np

    data = np.ones(BANDWIDTH_BYTES // 8, dtype=np.int64)
    parts = np.array_split(data, threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            rates.append(data.nbytes / (time.perf_counter() - start) / 1e9)
    return max(rates)
