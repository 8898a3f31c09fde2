"""The benchmark of distillation runs in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "distill.py"


@pytest.mark.parametrize("what", ["loss", "speed", "memory", "step", "cache", "sparse"])
def test_it_runs(what: str, tmp_path: Path) -> None:
    out, text = tmp_path / "out.json", tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Tom had {i} dogs. They ran and ran."}) + "\n" for i in range(200)))
    command = [sys.executable, str(BENCHMARK), what, "--smoke", "--out", str(out), "--data", str(text), "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(out.read_text())["rows"]) >= (1 if what in ("memory", "speed") else 2)


def test_a_training_step_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARK.with_name("train_step.py")), "--smoke", "--no-compile", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["packed_s"] > 0


def test_a_step_of_a_relative_runs(tmp_path: Path) -> None:
    """Both loops compute the same loss."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARK.with_name("distill_families.py")), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["losses"]["minitron"] == pytest.approx(found["losses"]["full logits"], rel=1e-3)
    assert found["parameters"][1] < found["parameters"][0]
    assert len(found["memory"]) == 2
