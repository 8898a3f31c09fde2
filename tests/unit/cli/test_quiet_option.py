"""`--quiet`: no progress; results, notes, warnings and errors as without it."""

from __future__ import annotations

import io
import sys
import warnings
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from text_checkpoint import make_text_checkpoint
from tqdm import tqdm
from typer.main import get_command
from typer.testing import CliRunner

from minitron.checkpoint.limits import CheckpointNote
from minitron.cli import app
from minitron.cli.common import say, show_notes
from minitron.cli.quiet_option import without_progress

LONG = ("train", "distill", "finetune", "prune", "compress", "curate", "eval", "teacher-cache", "convert", "predict")


def test_every_long_verb_has_the_option() -> None:
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for verb in LONG:
        names = [name for option in verbs[verb].params for name in option.opts]
        assert "--quiet" in names, verb
        assert len(names) == len(set(names)), verb


def test_only_progress_is_dropped() -> None:
    shown = io.StringIO()
    with redirect_stderr(shown), warnings.catch_warnings():
        warnings.simplefilter("always")
        show_notes()
        with without_progress():
            say("reading")
            say("note: two documents were skipped")
            sys.stderr.write("part of a line, ")
            for _ in tqdm(range(3), disable=False):
                pass
            sys.stderr.write("\rnote: after a bar\n")
            sys.stderr.flush()
            warnings.warn(CheckpointNote("the tokenizer is another one"), stacklevel=1)
        say("afterwards")
    assert shown.getvalue().splitlines() == [
        "note: two documents were skipped",
        "note: after a bar",
        "note: the tokenizer is another one",
        "afterwards",
    ]


def test_a_run_without_progress_prints_its_result_alone(tmp_path: Path) -> None:
    model = make_text_checkpoint(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    for quiet in (False, True):
        command = ["prune", str(model), str(tmp_path / f"out-{quiet}"), "--keep", "ffn=32", "--no-measure"]
        command += ["--calibration", str(text), "--samples", "2", "--sequence", "32", *(["--quiet"] if quiet else [])]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert "cut in" in done.stdout
        assert (done.stderr == "") == quiet


@pytest.mark.parametrize("verb", ["prune", "convert"])
def test_errors_are_shown(verb: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [verb, str(tmp_path / "nothing"), str(tmp_path / "out"), "-q"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
