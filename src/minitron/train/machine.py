"""What this machine can do for training: bfloat16, memory reuse, peak speed; and what a step costs on it."""

from __future__ import annotations

import ctypes
import re
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


PEAKS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Operations per second of dense bf16 products with fp32 sums, as the makers' data sheets give them, by a part of the
device's name. The first that fits counts, so longer names come before those that they contain."""


def known_peak(name: str, dtype: str) -> float | None:
    """The peak of a CUDA device by its name, for products in bfloat16; None if it is not known.

    Args:
        name: as `torch.cuda.get_device_name` gives it.
        dtype: what products run in, "bfloat16" or "float32"; of the latter no peak is known.
    """
    if dtype != "bfloat16":
        return None
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def peak_of(device: torch.device, dtype: str) -> float | None:
    """Operations per second that a device can do for `TrainConfig.dtype`: the denominator of MFU.

    Of a CUDA device what its data sheet says, if it is known here; of others what a matrix product reaches.
    """
    if device.type != "cuda":
        return measured_peak(device, dtype)
    runs_in = "bfloat16" if uses_bfloat16(device, dtype) else "float32"
    return known_peak(torch.cuda.get_device_name(device), runs_in)


def measured_peak(device: torch.device, dtype: str) -> float:
    """Operations per second of a large square matrix product, the best of several."""
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
