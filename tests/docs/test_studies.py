"""Each study runs, with lengths so small that its numbers mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_token_efficiency(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = (ROOT / "examples" / "black_beauty.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (texts / "easy.jsonl").write_text("".join(lines[8:]), encoding="utf-8")
    (texts / "heldout_simple.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    command = [sys.executable, str(ROOT / "studies" / "token_efficiency.py"), str(texts), "--quick", "--seeds", "1"]
    folders = [f"--{name}={tmp_path / name}" for name in ("runs", "out", "plots")]
    subprocess.run([*command, *folders], check=True, capture_output=True)
    result = json.loads((tmp_path / "out" / "token_efficiency.json").read_text())
    assert result["quick"] is True
    assert len(result["curves"]) == 5
    assert (tmp_path / "plots" / "token_efficiency.png").stat().st_size > 0
