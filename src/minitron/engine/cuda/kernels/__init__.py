"""Decoding kernels in Triton. Each function's docstring says what it computes; `tests/unit/engine/cuda/kernels` holds
it to plain torch. Importing this package does not import Triton.
"""

from __future__ import annotations
