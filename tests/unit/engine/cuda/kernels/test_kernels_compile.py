"""Kernels compile for a GPU that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[5] / "scripts" / "compile_kernels.py"


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke"], capture_output=True, text=True, env=given, timeout=500
    )


def test_kernels_compile_for_an_h100() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"_linear", "_up", "_down", "_gated", "_attend", "_join", "_gradient"} <= {row["kernel"] for row in rows}
    assert all(row["registers"] > 0 for row in rows)


def test_the_interpreter_compiles_nothing() -> None:
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set, so nothing is compiled" in done.stderr
