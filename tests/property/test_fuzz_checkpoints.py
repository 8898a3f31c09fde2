"""A short run of benchmarks/fuzz_checkpoints.py: mutated files of every format are read or refused, nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def test_mutated_checkpoints() -> None:
    pytest.importorskip("gguf")
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_checkpoints.py"
    spec = importlib.util.spec_from_file_location("fuzz_checkpoints", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    results = list(module.run(cases=40, seed=20_000_000))
    assert len(results) == 7
    assert [failure for result in results for failure in result.failures] == []
    assert sum(result.refused for result in results) > sum(result.cases for result in results) // 4
