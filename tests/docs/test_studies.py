"""Each study runs, with lengths so small that its numbers mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = ("token_efficiency", "candidates", "importance", "compensation", "losses", "steps", "curation")
# One process for all: most of the time of a study this small is spent on imports.
PROGRAM = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2].split(","):
    importlib.import_module(name).main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all of them were run in."""
    folder = tmp_path_factory.mktemp("studies")
    texts = folder / "texts"
    texts.mkdir()
    lines = (ROOT / "examples" / "black_beauty.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (texts / "easy.jsonl").write_text("".join(lines[8:]), encoding="utf-8")
    (texts / "heldout_simple.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    options = ["--quick", "--seeds", "1", *(f"--{name}={folder / name}" for name in ("runs", "out", "plots"))]
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "studies"), ",".join(STUDIES), str(texts), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / "out" / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_leaves_numbers_and_a_plot(results: Path, name: str) -> None:
    found = read(results, name)
    assert found["quick"] is True
    assert found["teacher"]["loss"] > 0
    assert (results / "plots" / f"{name}.png").stat().st_size > 0


@pytest.mark.slow
def test_token_efficiency_compares_all_ways(results: Path) -> None:
    found = read(results, "token_efficiency")
    assert len(found["curves"]) == 6
    assert all(points[0]["flops"] > 0 for points in found["curves"].values())
    assert {"least", "most", "reached"} <= found["factors"]["pruned, compensated, KD"][0].keys()


@pytest.mark.slow
def test_the_ranking_chooses_one_of_the_candidates(results: Path) -> None:
    found = read(results, "candidates")
    assert found["chosen"][0]["chosen"] in found["shapes"]
    assert found["stability"][-1]["spearman"]["mean"] == pytest.approx(1)
    assert found["stability"][-1]["regret"]["mean"] == 0


@pytest.mark.slow
def test_equal_arms_are_trained_once(results: Path) -> None:
    runs = [path.name for path in (results / "runs").iterdir() if (path / "result.json").is_file()]
    losses, steps = read(results, "losses"), read(results, "steps")
    assert "3L-224d-4h-2g-704f-l2-mean+compensation-kl-lr0.002-48-seed0" in runs
    assert losses["losses"]["kl"]["less the KL's"]["mean"] == 0
    assert steps["rows"]["one step"]["held-out loss"]["values"]


@pytest.mark.slow
def test_the_curation_study_counts_what_became_of_the_dirt(results: Path) -> None:
    found = read(results, "curation")
    assert list(found["rows"]) == ["raw", "curated", "clean"]
    assert [point["tokens"] for point in found["curves"]["raw"]] == [128, 256]
    assert found["corpora"][0]["raw"]["documents"] > found["corpora"][0]["curated"]["documents"]
    outcome = found["outcome"]
    for kind in ("other languages", "keyword lists", "menus", "evaluation items", "copies, exact and near"):
        assert outcome[kind]["planted"] > 0
        assert outcome[kind]["removed"]["mean"] >= 0.9, kind
    for kind in ("mojibake", "personal data"):
        assert outcome[kind]["removed or cleaned"]["mean"] == 1, kind
    assert outcome["clean documents with a version left"]["kept"]["mean"] > 0.5
