"""Each benchmark runs on a shape so small that its numbers mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_model_speed(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "model_speed.py"), "--smoke", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert result["weights"] == "random"
    assert {row["pass"] for row in result["speed"]} == {"forward", "forward+backward"}
    assert all(row["minitron"]["peak_bytes"] > 0 for row in result["memory"]["rows"])
