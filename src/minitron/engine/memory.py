"""Memory estimates: whether a model fits, before it is loaded."""

from __future__ import annotations

import torch

from ..config import ModelConfig
from ..memory import available_memory
from ..shapes import describe
from .cuda.device import free_memory
from .matrix import CUDA_FORMATS, FORMATS, PLAIN_BYTES
from .weights import weight_bytes


def require_memory(name: str, config: ModelConfig, format: str, generation_only: bool) -> None:
    """Refuse a model that does not fit.

    Args:
        name: the model's, for the message.
        config: its shape.
        format: of the loaded weights: one of `engine.matrix.FORMATS`, or "fp16".
        generation_only: whether it is loaded as `EngineWeights` alone; otherwise it is a model of torch, which needs
            memory for transposed matrices in addition when it decodes.

    Raises:
        ValueError: it needs more than is free; the message says what would fit.
    """
    left = available_memory()
    if generation_only:
        needed = weight_bytes(config, format)  # type: ignore[arg-type]
    else:
        needed = describe(config).num_parameters() * PLAIN_BYTES[format]
    if left is None or needed <= left:
        return
    sizes = {other: weight_bytes(config, other) for other in FORMATS}
    fitting = [f"{other} ({_gb(size)})" for other, size in sizes.items() if size <= left]
    least = min(sizes, key=sizes.__getitem__)
    advice = (
        f"with --format {', '.join(fitting)} it would fit"
        if fitting
        else f"no format fits, the smallest ({least}) takes {_gb(sizes[least])}"
    )
    raise ValueError(f"{name} takes {_gb(needed)} of memory in {format}, and {_gb(left)} are free; {advice}")


def require_device_memory(
    name: str, config: ModelConfig, format: str, generation_only: bool, device: torch.device
) -> None:
    """As `require_memory`, for the memory of a GPU.

    Raises:
        ValueError: the weights need more than is free there; the message says what would fit.
    """
    left = free_memory(device)
    sizes = {other: weight_bytes(config, other) for other in FORMATS if other in CUDA_FORMATS}
    needed = sizes[format] if generation_only else describe(config).num_parameters() * PLAIN_BYTES[format]
    if left is None or needed <= left:
        return
    fitting = [f"{other} ({_gb(size)})" for other, size in sizes.items() if size <= left]
    advice = f"with --format {', '.join(fitting)} it would fit" if fitting else "no format fits; try --device cpu"
    raise ValueError(
        f"{name} takes {_gb(needed)} of memory in {format}, and {_gb(left)} are free on {device}; {advice}"
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
