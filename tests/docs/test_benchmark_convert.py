"""benchmarks/convert.py runs; its figures are for a quiet machine, not for here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    command = [sys.executable, str(ROOT / "benchmarks" / "convert.py"), "--smoke", "--no-verify"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([*command, "--json", str(tmp_path / "figures.json")], check=True, env=environment, timeout=600)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["conversions"]) == ["hf -> nemo", "nemo -> hf", "hf -> gguf q8_0"]
    for result in figures["conversions"].values():
        assert result["bytes_written"] > 0
        assert 0 < result["peak_memory"] < 1_500_000_000
