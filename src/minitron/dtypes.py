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
    text = str(name).removeprefix("torch.").lower()
    short = _OTHER_NAMES.get(text, text)
    if short == "auto":
        return None
    if short not in DTYPES:
        raise ValueError(f"{option} is {str(name)!r}; it must be auto, {', '.join(DTYPES)}")
    return DTYPES[short]


def dtype_name(dtype: torch.dtype) -> str | None:
    """The short name of a dtype; None if it has none here."""
    return next((name for name, known in DTYPES.items() if known == dtype), None)
