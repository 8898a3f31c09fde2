"""examples/customize/run.py in small: each example trains, reports, and is not trained again."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from minitron.cli.finetune import finetune

FILE = Path(__file__).parents[2] / "examples" / "customize" / "run.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("customize", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the example extends
    spec.loader.exec_module(module)
    return module


def test_each_example_trains_and_reports(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(finetune)
    runs: list[str] = []

    def run(command: Sequence[str]) -> None:
        done = CliRunner().invoke(app, list(command[1:]))
        assert done.exit_code == 0, done.output
        runs.append(command[0])

    monkeypatch.setattr(example, "run", run)
    given = ["--model", "bundled-half", "--smoke", "--out", str(tmp_path)]
    example.main(given)
    assert (tmp_path / "style/run/model/config.json").exists()
    for name in ("topics", "names", "answers", "spam", "preferences"):
        scores = json.loads((tmp_path / name / "run/report.json").read_text())["scores"]
        assert "model" in scores
        assert len(scores) > 1, name
    example.main(given)
    assert runs == ["finetune"] * 6


def test_rows(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full rows that need no data sets: a style, a preference that length does not tell, mails without doubles."""
    source = example.Source(smoke=False, data=None, folder=tmp_path)
    assert "Dear child" in example.style(source)["rows.jsonl"]
    pairs = [json.loads(line) for line in example.preferences(source)["rows.jsonl"].splitlines()]
    longer = [len(pair["chosen"][0]["content"]) > len(pair["rejected"][0]["content"]) for pair in pairs]
    assert len(pairs) > 50
    assert 0.4 < sum(longer) / len(pairs) < 0.6
    mails = [(f"{label} {number}", label) for number in range(100) for label in ("spam", "ham")]
    monkeypatch.setattr(example.train_guard, "read_mails", lambda package: mails)
    (tmp_path / "corpus.tgz").touch()
    files = example.spam(source)
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}
    assert sorted(rows) == ["rows.jsonl", "test.jsonl", "validation.jsonl"]
    assert sorted((row["text"], row["label"]) for part in rows.values() for row in part) == sorted(mails)


def test_without_data_sets(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All examples: those that need data sets are skipped. One that is named: an error."""
    trained: list[str] = []
    monkeypatch.setattr(example, "customize", lambda name, *_: trained.append(name))
    example.main(["--out", str(tmp_path)])
    assert trained == ["spam", "style", "preferences"]
    assert "topics: skipped, since it needs --data DATASETS" in capsys.readouterr().out
    for wrong, message in (("names", "names needs --data DATASETS"), ("poems", "there is no example poems")):
        with pytest.raises(SystemExit):
            example.main([wrong, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
