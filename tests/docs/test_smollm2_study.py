"""The SmolLM2 study runs on a tiny model, goes on where it was killed, and reports what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Two runs in one process: most of the time of a study this small is spent on imports.
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import smollm2
smollm2.main([*sys.argv[2:], "--only", "-0: bits"])
page = Path(sys.argv[-1]) / "smollm2.md"
page.rename(page.with_name("early.md"))
smollm2.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study after a first part, reported, and then to its end."""
    place = tmp_path_factory.mktemp("smollm2")
    options = ["--smoke", "--threads", "1", "--run", str(place / "run"), "--out", str(place), "--page", str(place)]
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "studies"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.slow
def test_an_early_report_says_what_is_missing(folder: Path) -> None:
    page = (folder / "early.md").read_text(encoding="utf-8")
    assert "Training: not run" in page
    assert page.count("not run") > 20


@pytest.mark.slow
def test_every_way_is_trained_and_measured(folder: Path) -> None:
    found = json.loads((folder / "smollm2.json").read_text(encoding="utf-8"))
    assert found["steps"]["done"] == found["steps"]["of"] > 40
    trained = {(m["way"], m["size"]): m for m in found["models"] if m["tokens"] and all(m["text"].values())}
    assert {way.split("-")[0] for way, _ in trained} == {"ours", "depth", "random", "magnitude", "torch", "scratch"}
    assert len(trained) == 12
    # Random weights see more tokens, and cost as much as those with a teacher without what calibration costs.
    ours, scratch = (trained[way, "50%"] for way in ("ours", "scratch"))
    assert scratch["trained_tokens"] > ours["trained_tokens"] == 128
    random = trained["random", "50%"]
    assert scratch["flops"] == pytest.approx(random["flops"], rel=0.01)
    assert ours["flops"] > random["flops"]
    assert set(ours["tasks"]) == set(found["parent"]["tasks"])
    assert len(ours["tasks"]) == 7
    page = (folder / "smollm2.md").read_text(encoding="utf-8")
    assert page.count("; 128 tokens |") == 24  # twelve children, bits per byte and tasks
    assert (folder / "smollm2.png").stat().st_size > 10_000


@pytest.mark.slow
def test_nothing_is_done_twice(folder: Path) -> None:
    ledger = (folder / "run" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in ledger]
    assert len(steps) == len(set(steps))
