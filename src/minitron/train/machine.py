"""What this machine can do for training: bfloat16, memory reuse, peak speed; and what a step costs on it."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

# glibc's mallopt: parameter -> value. Buffers of activations are freed and allocated again at every step. With the
# defaults they go back to the kernel, and clearing their pages again takes a third of the time of a small model.
_MALLOC_SETTINGS = {-1: 2**31 - 1, -2: 2**28, -3: 2**30}  # trim threshold, top pad, mmap threshold


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next step (glibc only); whether it does."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(key, value) for key, value in _MALLOC_SETTINGS.items())


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run on hardware here, rather than being emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))
    return False


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which a forward pass runs for `TrainConfig.dtype`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(device, dtype))


def uses_bfloat16(device: torch.device, dtype: str) -> bool:
    """Whether matrix products run in bfloat16 for `TrainConfig.dtype`."""
    return dtype == "bfloat16" or (dtype == "auto" and has_bfloat16(device))


@dataclass(frozen=True)
class StepCost:
    """Time and memory of one measured step."""

    seconds_per_step: float
    peak_bytes: int
    """Peak memory of the process (CPU) or of the device, optimizer included."""


def state_bytes(model: nn.Module) -> int:
    """Bytes of weights, gradients and the two AdamW averages of what is trained."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sum(p.numel() * p.element_size() for p in model.parameters()) + 3 * trained


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the device if it has its own, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Stopwatch:
    """Seconds since it was created, plus those given."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start


def measured_peak(device: torch.device, dtype: str) -> float:
    """Operations per second of a large square matrix product, the best of several: the denominator of MFU."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if uses_bfloat16(device, dtype) else torch.float32)
    best = 0.0
    for _ in range(6):
        watch = Stopwatch()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / watch.seconds)
    return best
