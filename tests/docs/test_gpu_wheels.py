"""Which wheels a machine with a GPU lacks."""

from __future__ import annotations

import runpy
from importlib import metadata
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_wheels.py"


def test_everything_but_torch_travels() -> None:
    found = runpy.run_path(str(SCRIPT))["wheels"]()
    assert {"transformers", "tokenizers", "safetensors", "numpy", "numba", "llvmlite", "pytest", "hypothesis"} < set(
        found
    )
    assert not {"torch", "triton", "minitron", "sympy", "networkx"} & set(found)
    assert all(metadata.version(name) == version for name, version in found.items())
