"""Decoding kernels in Triton. Each function's docstring says what it computes; `tests/unit/engine/cuda/kernels` holds
them to plain torch. Importing this package does not import Triton.
"""

from __future__ import annotations

FORMATS = ("bf16", "fp16", "fp32", "int8", "int4")
"""Formats of matrices that the kernels read."""
MOST_ROWS = 32
"""Rows of one call."""
