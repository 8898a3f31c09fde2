"""The benchmarks of pruning run on a few lines of text and a tiny shape; their numbers mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_prune_quality(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arms = ["(l2, mean)", "random", "torch-pruning taylor"]
    command = [sys.executable, str(BENCHMARKS / "prune_quality.py"), "--smoke", "--out", str(out), "--only", *arms]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert result["weights"] == "the bundled model"
    for losses in result["losses"].values():
        assert set(arms) <= set(losses)
        assert all(value > result["loss_before"] for value in losses["random"])


def test_prune_importance(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "prune_importance.py"), "--smoke", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert result["weights"] == "random"
    assert len(result["layers"]) == result["layers_of_the_model"] == 2
    assert result["scoring"]["peak_bytes"] > 0
