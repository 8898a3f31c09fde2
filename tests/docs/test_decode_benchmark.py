"""The decode benchmark runs on a shape so small that its numbers mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytest.importorskip("matplotlib")


def test_decode(tmp_path: Path) -> None:
    out, picture = tmp_path / "result.json", tmp_path / "roofline.png"
    command = [sys.executable, str(BENCHMARKS / "decode.py"), "--smoke", "--zeros", "0.9", "--formats", "bf16,int8"]
    subprocess.run([*command, "--out", str(out), "--plot", str(picture)], check=True, capture_output=True)
    rows = json.loads(out.read_text())["rows"]
    assert [row["format"] for row in rows] == ["bf16", "int8"]
    assert all("random, 90% zeros" in row["name"] for row in rows)
    assert all(row["peers"]["transformers"]["times"] > 0 for row in rows)
    assert picture.stat().st_size > 1000
    subprocess.run([*command[:3], "--speculation", "--out", str(out)], check=True, capture_output=True)
    found = json.loads(out.read_text())["speculation"]
    assert all(row["same_text"] for row in found if not row["sampled"] or row["draft"] == "lookup")
    subprocess.run(
        [*command[:3], "--batch", "1,3", "--zeros", "0.9", "--out", str(out)], check=True, capture_output=True
    )
    found = json.loads(out.read_text())["batches"]
    assert [row["batch"] for row in found] == [1, 3]
    assert all(row["times"] > 0 for row in found)


def test_greedy_equality(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "Once upon a time there was a dog. It ran into the wood. " * 30}) + "\n")
    command = [sys.executable, str(BENCHMARKS / "greedy_equality.py"), "--text", str(text), "--prompts", "2"]
    for against in ("reference", "transformers"):
        options = ["--tokens", "3", "--against", against]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        assert found["tokens"] == 6
        assert found["differ"] == found.get("near_ties", found["differ"])
