"""Each benchmark runs on a shape so small that its numbers mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_model_speed(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "model_speed.py"), "--smoke", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert result["weights"] == "random"
    assert {row["pass"] for row in result["speed"]} == {"forward", "forward+backward"}
    assert all(row["minitron"]["peak_bytes"] > 0 for row in result["memory"]["rows"])


@pytest.mark.parametrize("part", ["agreement", "memory"])
def test_eval(part: str, tmp_path: Path) -> None:
    data = Path(os.environ.get("MINITRON_DATA", BENCHMARKS.parents[1] / "shared" / "datasets"))
    if part == "agreement" and not data.is_dir():
        pytest.skip(f"no data sets in {data}")
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "eval.py"), part, "--smoke", "--data", str(data), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(out.read_text())[part]
    if part == "memory":
        assert found["minitron"]["peak_bytes"] > 0
    else:
        assert all(row.get("largest_difference_nats", 0) < 1e-4 for row in found["rows"])


@pytest.mark.parametrize("shape", ["nemotron-4-15b", "llama-3.1-8b"])
def test_prune_surgery(tmp_path: Path, shape: str) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "prune_surgery.py"), "--smoke", "--json", str(out), "--shape", shape]
    subprocess.run([*command, "--folder", str(tmp_path)], check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert result["weights"] == "random"
    assert result["results"]["cut"]["bytes_written"] < result["bytes"] == result["results"]["sorted"]["bytes_written"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_formats() -> None:
    options = ["--smoke", "--layers", "1", "--tokens", "2", "--formats", "bf16", "int4", "--zeros", "0.5", "--json"]
    command = [sys.executable, str(BENCHMARKS / "formats.py"), *options]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["rows"]
    assert [row["format"] for row in rows] == ["bf16", "int4"]
    assert rows[1]["bytes_per_token"] < 0.35 * rows[0]["bytes_per_token"]


def test_format_fidelity(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who lived near the sea. " * 4)
    command = [sys.executable, str(BENCHMARKS / "format_fidelity.py"), "--text", str(text), "--json", "--window", "40"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    peers = ["llama.cpp q8_0", "llama.cpp q4_0"]
    assert [row["format"] for row in rows] in (["bf16", "bf12", "int8", "int4", *more] for more in (peers, []))
    assert rows[1]["kl"] < 1e-6 < rows[2]["kl"] < rows[3]["kl"]


def test_serve() -> None:
    """Our server alone: llama.cpp's is not started in a smoke run."""
    pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")
    command = [sys.executable, str(BENCHMARKS / "serve.py"), "--smoke", "--clients", "4"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    ours = found["minitron"]
    assert ours["4 clients, tokens/s"] > 0
    assert ours["first token after 60, ms"] > 0
    assert ours["longest gap while 60 arrive, ms"] > 0
    assert ours["turns"] == pytest.approx(ours["second turn, ms"] / ours["first turn, ms"], rel=0.01)
    assert set(found["engine alone, tokens/s"]) == {"4", "1"}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_connections() -> None:
    pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")
    command = [sys.executable, str(BENCHMARKS / "connections.py"), "--smoke"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert found["different answers"] == 0
    assert found["status of the server's process"] == 0
    assert sum(found["received"]["not HTTP"].values()) == 10
