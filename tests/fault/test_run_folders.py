"""Two processes in one run folder, run folders that hold what they read, and text that changed under a run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compress_samples import small_recipe
from small_run import small_config, small_model, small_run, small_stream
from text_checkpoint import make_text_checkpoint
from typer.testing import CliRunner

from minitron.cli import app
from minitron.compress.recipe import recipe_from
from minitron.compress.run import compress
from minitron.compress.stages import RunError
from minitron.files import LockedError, TargetError, locked
from minitron.train.loop import train
from minitron.train.resume import list_steps

COMPRESS = ["--heldout-share", "0.2", "--tokens", "1k", "--sequence", "32"]
LENGTH = ["--steps", "2", "--batch", "2", "--sequence", "32", "--warmup", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_text_checkpoint(folder / "model")
    return folder


def write_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        rows = [{"text": f"{name} {i}: the cat sat on the mat and the dog ran to the sea " * 2} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stderr


def test_a_second_training_in_a_folder_is_told_of_the_first(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "samples" / "small_run.py"
    command = [sys.executable, str(script), str(tmp_path / "run"), "100000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not list_steps(tmp_path / "run"):
                assert process.poll() is None
            with pytest.raises(LockedError, match=f"another run is at work in this folder .process {process.pid} on"):
                small_run(tmp_path / "run", 100_000)
        finally:
            process.send_signal(signal.SIGKILL)
    step = max(step for step, _ in list_steps(tmp_path / "run"))
    result = train(
        small_model(0.1), small_stream(), small_config(100_000), tmp_path / "run", quiet=True, until=step + 2
    )
    assert result.step == step + 2
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("verb", ["train", "distill", "teacher-cache", "compress", "prune"])
def test_every_verb_that_keeps_a_folder_locks_it(base: Path, tmp_path: Path, verb: str) -> None:
    out, model, data = tmp_path / "out", base / "model", write_corpus(tmp_path / "corpus")
    commands: dict[str, list[object]] = {
        "train": ["--model", model, "--data", data, "--out", out, *LENGTH],
        "distill": [model, "--teacher", model, "--data", data, "--out", out, *LENGTH],
        "teacher-cache": [model, "--data", data, "--out", out, "--sequence", 32],
        "compress": [model, out, "--data", data, "--keep", "ffn=32", *COMPRESS],
        "prune": [model, out, "--keep", "ffn=32", "--no-measure"],
    }
    with locked(tmp_path / ".out.pruning" if verb == "prune" else out):
        code, errors = call(verb, *commands[verb])
    assert code == 2
    assert "another run is at work in this folder" in errors.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("verb", ["train", "distill", "teacher-cache", "compress"])
def test_folders_that_overlap_with_what_is_read(base: Path, tmp_path: Path, verb: str) -> None:
    data = write_corpus(tmp_path / "corpus")
    (tmp_path / "link").symlink_to(data)
    (data / "inner").mkdir()
    (data / "inner" / "x.txt").write_text("some text")
    model = base / "model"
    before = sorted(path.name for path in base.rglob("*"))

    def attempt(out: Path, text: object = data, source: Path = model) -> str:
        commands: dict[str, list[object]] = {
            "train": ["--model", source, "--data", text, "--out", out, *LENGTH],
            "distill": [model, "--teacher", source, "--data", text, "--out", out, *LENGTH],
            "teacher-cache": [source, "--data", text, "--out", out, "--sequence", 32],
            "compress": [source, out, "--data", text, "--keep", "ffn=32", *COMPRESS],
        }
        code, errors = call(verb, *commands[verb])
        assert code == 2
        return errors

    for out in (data / "run", tmp_path / "link" / "run", tmp_path / "link" / ".." / "corpus" / "x" / "run"):
        assert "lies inside" in attempt(out)
        assert "lies inside" in attempt(out, text=f"{data}:2")
    assert "which is read; choose another target" in attempt(data, text=data / "inner")
    assert "which is read; choose another target" in attempt(data, text=data / "a.jsonl")
    for out in (model / "run", base, model):
        text = attempt(out)
        assert "which is read" in text or "the same" in text
    assert sorted(path.name for path in base.rglob("*")) == before
    assert sorted(path.name for path in data.iterdir()) == ["a.jsonl", "b.jsonl", "inner"]


def test_a_changed_file_is_named_when_a_run_continues(base: Path, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus")
    command = ["train", "--model", base / "model", "--data", data, "--out", tmp_path / "run", *LENGTH]
    code, errors = call(*command)
    assert code == 0, errors
    (data / "b.jsonl").write_text('{"text": "the cat sat on another mat and so on and on"}\n' * 40)
    code, errors = call(*command)
    assert code == 2
    assert "the text is not the same (changed: b.jsonl)" in errors


def test_a_changed_file_is_named_by_a_cache_of_the_teacher(base: Path, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus")
    cache = ["teacher-cache", base / "model", "--data", data, "--out", tmp_path / "targets", "--sequence", 32]
    assert call(*cache)[0] == 0
    assert not list((tmp_path / "targets").glob(".*"))
    (data / "c.txt").write_text("more text than there was before")
    code, errors = call(*cache)
    assert code == 2
    assert "holds another cache; choose another folder: " in errors
    assert "added: c.txt" in errors
    use = ["distill", base / "model", "--teacher-cache", tmp_path / "targets", "--data", data, "--out", tmp_path / "kd"]
    code, errors = call(*use, *LENGTH)
    assert code == 2
    assert "made from other data (added: c.txt)" in errors


def test_what_changed_is_named_by_a_compression(tmp_path: Path) -> None:
    values: dict[str, Any] = small_recipe(tmp_path)
    run = tmp_path / "run"
    compress(recipe_from(values), run, quiet=True, say=lambda _: None)
    lines = (tmp_path / "text.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(RunError, match=r"importance was made with other inputs .* \(changed: text\.jsonl\)"):
        compress(recipe_from(values), run, quiet=True, say=lambda _: None)
    (tmp_path / "text.jsonl").write_text("".join(lines))
    other = {**values, "train": {**values["train"], "lr": 5e-4}}
    with pytest.raises(RunError, match=r"lr was 0\.001, is 0\.0005"):
        compress(recipe_from(other), run, quiet=True, say=lambda _: None)


def test_files_beside_the_exported_model_are_kept(tmp_path: Path) -> None:
    small_run(tmp_path / "run", 2)
    small_run(tmp_path / "run", 2)
    (tmp_path / "run" / "model" / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match=r"run/model: notes\.txt was not written by minitron"):
        small_run(tmp_path / "run", 2)
    assert (tmp_path / "run" / "model" / "notes.txt").read_text() == "mine"
