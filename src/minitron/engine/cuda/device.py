"""What a CUDA device can do and how much memory it has left, as sentences for people."""

from __future__ import annotations

import torch

from ...dtypes import dtype_name
from ...memory import available_memory

LEAST_BF16 = (8, 0)
"""Compute capability from which on a GPU multiplies in bf16."""


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where nothing is known."""
    if device.type != "cuda":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory


def why_not_dtype(dtype: torch.dtype, device: torch.device) -> str:
    """Why a device cannot multiply in a dtype; empty if it can."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) >= LEAST_BF16:
        return ""
    name = torch.cuda.get_device_name(device)
    return f"{name} has no {dtype_name(dtype)} arithmetic; load the model with dtype fp16 or fp32"


def why_no_cuda() -> str:
    """Why torch cannot use a CUDA device on this machine, and what is missing; empty if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with it (pytorch.org/get-started)"
    if torch.cuda.is_available():
        return ""
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        if "driver" in reason and "too old" in reason:
            return f"the NVIDIA driver is too old for CUDA {torch.version.cuda}: {reason}"
        return f"torch was built for CUDA {torch.version.cuda}, and there is no usable GPU: {reason}"
    return "torch reports no CUDA device"


def why_no_device(device: torch.device) -> str:
    """Why this machine does not have a CUDA device; empty if it has."""
    reason = why_no_cuda()
    count = 0 if reason else torch.cuda.device_count()
    if reason or device.index is None or device.index < count:
        return reason
    return f"this machine has {count} CUDA device{'' if count == 1 else 's'}, the last one is cuda:{count - 1}"
