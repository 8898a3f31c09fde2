"""Names of floating dtypes: the one table of them."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The short name of each dtype that weights may have."""

_OTHER_NAMES = {"bfloat16": "bf16", "float16": "fp16", "f16": "fp16", "half": "fp16", "float32": "fp32", "f32": "fp32"}


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
    if short not in DTYPES:
        raise ValueError(f"{option} is {str(name)!r}; it must be auto, {', '.join(DTYPES)}")
    return DTYPES[short]


def short_name(name: str) -> str:
    """The short name of a dtype, of any of its names in any case; other words come back as they are."""
    text = name.removeprefix("torch.").lower()
    short = _OTHER_NAMES.get(text, text)
    return short if short in DTYPES else name


def long_name(name: str) -> str:
    """As `short_name`, the name that torch has for it: "bfloat16" for "bf16"."""
    known = DTYPES.get(short_name(name))
    return name if known is None else str(known).removeprefix("torch.")


def dtype_name(dtype: torch.dtype) -> str | None:
    """The short name of a dtype; None if it has none here."""
    return next((name for name, known in DTYPES.items() if known == dtype), None)
