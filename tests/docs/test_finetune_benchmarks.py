"""The benchmarks of fine-tuning and of predictions run on a tiny model; their numbers mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def result_of(script: str, *options: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_finetune() -> None:
    """Both sides learn about the same number of tokens, of the same rows."""
    sides = result_of("finetune.py", "--sides", "minitron", "trl")["sides"]
    assert list(sides) == ["minitron", "trl"]
    assert all(side["peak_bytes"] > 0 and side["tokens_per_s"] > 0 for side in sides.values())
    assert 0.5 < sides["minitron"]["tokens"][0] / sides["trl"]["tokens"][0] < 2


def test_predict() -> None:
    result = result_of("predict.py")
    assert result["largest_difference_of_probabilities"] < 1e-5
    assert result["padded_tokens_per_token"]["4"] > 1
    assert set(result["found"]) == {"minitron", "pipeline 4"}
