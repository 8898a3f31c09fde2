"""Names of floating dtypes: the one table of them. torch is imported when a dtype itself is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LONG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""The short name of each dtype that weights may have, and torch's name for it."""

_OTHER_NAMES = {"f16": "fp16", "half": "fp16", "f32": "fp32"} | {long: short for short, long in LONG_NAMES.items()}


def parse_dtype(name: str | torch.dtype, option: str = "dtype") -> torch.dtype | None:
    """The dtype of that name in any case, as "bf16", "BF16" or "bfloat16"; None for "auto".

    Args:
        name: a name, or a dtype.
        option: what the error calls it.

    Raises:
        ValueError: no such dtype, or one that weights cannot have here.
    """
    short = short_name(str(name))
    if short.lower() == "auto":
        return None
    if short not in LONG_NAMES:
        raise ValueError(f"{option} is {str(name)!r}; it must be auto, {', '.join(LONG_NAMES)}")
    import torch

    return getattr(torch, LONG_NAMES[short])


def short_name(name: str) -> str:
    """The short name of a dtype, of any of its names in any case; other words come back as they are."""
    text = name.removeprefix("torch.").lower()
    short = _OTHER_NAMES.get(text, text)
    return short if short in LONG_NAMES else name


def long_name(name: str) -> str:
    """As `short_name`, the name that torch has for it: "bfloat16" for "bf16"."""
    return LONG_NAMES.get(short_name(name), name)


def dtype_name(dtype: torch.dtype) -> str | None:
    """The short name of a dtype; None if it has none here."""
    short = short_name(str(dtype))
    return short if short in LONG_NAMES else None
