"""Stages in folders: what is done is not done again, what was interrupted goes on, what depends on it is made anew."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.files import write_json

NOTE = "stage.json"


@dataclass
class Stage:
    """What one stage did."""

    name: str
    title: str
    folder: Path
    commands: list[str] = field(default_factory=list)
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files that must be the same in every run."""


class Platform:
    """The stages of a run folder, in order.

    Args:
        out: the run folder.
        quiet: print nothing.
    """

    def __init__(self, out: Path, quiet: bool = False) -> None:
        self.out = out
        self.quiet = quiet
        self.stages: list[Stage] = []
        self._state = ""

    def stage(self, name: str, title: str, settings: Any, work: Callable[[Stage], None], outputs: list[str]) -> Stage:
        """Do a stage, unless its note says that it was done with the same settings after the same stages.

        Args:
            settings: values of JSON that decide what is made.
            work: does it; the stage's folder may hold what an interrupted call has left.
            outputs: patterns of files below the folder that must be the same in every run.
        """
        key = hashlib.sha256(json.dumps([self._state, name, settings], sort_keys=True).encode()).hexdigest()
        stage = Stage(name, title, self.out / name)
        begun, note = stage.folder / "begun.json", stage.folder / NOTE
        if stage.folder.exists() and any(stage.folder.iterdir()) and _key(begun) != key:
            if not begun.exists():
                raise SystemExit(
                    f"{stage.folder}: holds no {begun.name}, so it is not of this example; name a new folder"
                )
            shutil.rmtree(stage.folder)  # made with other settings
        stage.folder.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            write_json(begun, {"key": key})
            self._say(f"{name}: {title}")
            start = time.perf_counter()
            work(stage)
            stage.seconds = time.perf_counter() - start
            stage.outputs = _digests(stage.folder, outputs)
            write_json(
                note,
                {
                    "commands": stage.commands,
                    "seconds": round(stage.seconds, 1),
                    "facts": stage.facts,
                    "outputs": stage.outputs,
                },
            )
        stage = Stage(name, title, stage.folder, **json.loads(note.read_text(encoding="utf-8")))
        self._say(f"{name}: done in {stage.seconds:.0f} s")
        self._state = hashlib.sha256((key + json.dumps(stage.outputs, sort_keys=True)).encode()).hexdigest()
        self.stages.append(stage)
        return stage

    def minitron(self, stage: Stage, *words: object) -> dict[str, Any]:
        """Run `minitron WORDS --json` in this process, so that torch is imported once; returns what it prints."""
        from typer.main import get_command

        from minitron.cli import app

        command = [str(word) for word in words]
        stage.commands.append(shlex.join(["minitron", *(self.relative(word) for word in command)]))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = get_command(app).main([*command, "--json"], prog_name="minitron", standalone_mode=False)
        if code:
            raise SystemExit(f"{stage.commands[-1]} ended with exit code {code}; the same command goes on")
        return json.loads(printed.getvalue())

    def relative(self, word: str) -> str:
        """Paths of the run folder as they are written in a page that may be moved."""
        return word.replace(f"{self.out}/", "")

    def _say(self, sentence: str) -> None:
        if not self.quiet:
            print(sentence, file=sys.stderr, flush=True)


def _key(begun: Path) -> str | None:
    try:
        return json.loads(begun.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError):
        return None


def _digests(folder: Path, patterns: list[str]) -> dict[str, str]:
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    if not files:
        raise SystemExit(f"{folder}: none of {', '.join(patterns)} was made")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
