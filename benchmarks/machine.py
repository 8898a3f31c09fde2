"""What the machine can do, measured in the run that reports it."""

from __future__ import annotations

import platform
import resource
import sys
import time
from pathlib import Path

import torch


def seconds(work, repeats: int = 5) -> float:
    """Best of a few runs of `work`, synchronized with the GPU where there is one."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def peak_resident() -> int:
    """Bytes. Linux counts the memory of the process that forked this one in `ru_maxrss`, but not in VmHWM."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Let `peak_resident` count from here, where the system can (Linux)."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5", encoding="ascii")


def describe(device: str = "cpu", smoke: bool = False) -> dict:
    """Processor, threads, read bandwidth (GB/s) and matrix product speed (GFLOP/s) in fp32 and bf16."""
    # 2 GiB are more than any cache, of shared servers too
    big = torch.ones(1 << (20 if smoke else 28), dtype=torch.int64, device=device)
    n = 256 if smoke else 2048
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "read_bandwidth_gb_per_s": round(big.numel() * 8 / seconds(big.sum) / 1e9, 1),
    }
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(n, n, device=device).to(dtype)
        rate = 2 * n**3 / seconds(lambda a=a: a @ a) / 1e9
        facts[f"matmul_{str(dtype).removeprefix('torch.')}_gflop_per_s"] = round(rate)
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{len(names)} x {names[0]}" if names else platform.processor()
