"""Whether a model fits into memory, said before it is loaded."""

from __future__ import annotations

from ..config import NemotronConfig
from ..memory import available_memory
from .quantize import FORMATS, PLAIN
from .weights import packed_bytes


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
