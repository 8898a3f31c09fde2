"""The releases that the tests run on, in a file that imports nothing."""

from __future__ import annotations

TRANSFORMERS = ("5.23.0",)
"""The releases of transformers on which the whole suite, or all of `make compat`, passed: docs/compatibility.md."""

PINNED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "numpy": "2.4.6",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "jinja2": "3.1.6",
    "tqdm": "4.70.1",
    "typer": "0.29.2",
    "numba": "0.68.1",
}
"""The required packages, in the releases of `constraints.txt`."""
