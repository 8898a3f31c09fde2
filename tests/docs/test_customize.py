"""examples/customize/run.py in small: each example trains, reports, and is not trained again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from minitron.cli.finetune import finetune

FILE = Path(__file__).parents[2] / "examples" / "customize" / "run.py"


def test_each_example_trains_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("customize", FILE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    app = typer.Typer()
    app.command()(finetune)
    runs: list[str] = []

    def run(command: Sequence[str]) -> None:
        done = CliRunner().invoke(app, list(command[1:]))
        assert done.exit_code == 0, done.output
        runs.append(command[0])

    monkeypatch.setattr(example, "run", run)
    names = ["topics", "names", "answers", "style"]
    given = [*names, "--model", "bundled-half", "--smoke", "--out", str(tmp_path)]
    example.main(given)
    assert (tmp_path / "style/run/model/config.json").exists()
    for name in names[:3]:
        scores = json.loads((tmp_path / name / "run/report.json").read_text())["scores"]
        assert "model" in scores
        assert len(scores) > 1, name
    example.main(given)
    assert runs == ["finetune"] * 4
    assert "Dear child" in example.style(None)["rows.jsonl"]
    with pytest.raises(SystemExit):
        example.main(["names", "--out", str(tmp_path)])
