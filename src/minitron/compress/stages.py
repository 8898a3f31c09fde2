"""Stages of a run: each has a folder, does its work once, and leaves a note that it is done.

The notes hold no path outside the run folder, so that the folder can be copied to another machine and continued there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from ..train.text_changes import text_changes

DONE = "stage.json"


class RunError(ValueError):
    """A run folder that cannot be continued."""


class StoppedError(Exception):
    """A signal ended the run early, with everything saved; the same call continues it."""


class Stages:
    """The stages of one run folder, in the order in which they are asked for."""

    def __init__(
        self, folder: Path, say: Callable[[str], None], texts: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self.folder = folder
        self.texts = texts
        """`describe_texts` of the data, which explains why a stage is not the same."""
        self.say = say
        self.facts: dict[str, dict[str, Any]] = {}
        """What each stage found, by its name; JSON values."""
        self.seconds: dict[str, float] = {}
        """Time of each stage in all calls."""

    def run(
        self, name: str, inputs: Mapping[str, Any], work: Callable[[Path], dict[str, Any]], *, fresh: bool = False
    ) -> dict[str, Any]:
        """Do a stage, or say what it found when it was done before.

        Args:
            name: of the folder below the run folder; may have parts, as in "step-1/prune".
            inputs: what the result depends on; JSON values.
            work: does it in the folder it is given, and returns what it found, JSON values. After an interruption it
                is called again in the same folder and goes on from what it finds there.
            fresh: the work cannot go on: begin with an empty folder.

        Raises:
            RunError: the stage was done with other inputs.
        """
        folder = self.folder / name
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        note = folder / DONE
        if note.is_file():
            values = _read(note)
            if values.get("inputs") != digest:
                raise RunError(
                    f"{folder} was made from something else than what is asked for now "
                    f"({self._difference(values, inputs)}); choose another run folder, or delete that one to do the "
                    f"stage again"
                )
            self.facts[name], self.seconds[name] = values["facts"], values["seconds"]
            self.say(f"{name}: done before")
            return self.facts[name]
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        clock = folder / "seconds.json"
        before = _read(clock).get("seconds", 0.0) if clock.is_file() else 0.0
        self.say(f"{name}: {'going on' if before else 'begins'}")
        began = time.monotonic()
        try:
            facts = work(folder)
        finally:
            spent = before + time.monotonic() - began
            _write(clock, {"seconds": spent})
        made_from = {"inputs": digest, "given": inputs, "texts": self.texts}
        _write(note, {**made_from, "facts": facts, "seconds": spent})
        clock.unlink()
        self.facts[name], self.seconds[name] = facts, spent
        return facts

    def _difference(self, note: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
        """What is not as it was when the stage was done."""
        before, now = note.get("given"), json.loads(json.dumps(inputs, default=str))
        if before is None:
            return "another checkpoint, text or setting"
        clauses = []
        for key in sorted({*before, *now}):
            old, new = before.get(key), now.get(key)
            if old == new:
                continue
            if key == "data":
                clauses.append(text_changes(note.get("texts"), self.texts or []) or "another text")
            elif isinstance(old, dict) and isinstance(new, dict):
                changed = (part for part in sorted({*old, *new}) if old.get(part) != new.get(part))
                clauses += [f"{key} {part} was {old.get(part)!r}, is {new.get(part)!r}" for part in changed]
            elif _is_fingerprint(old) and _is_fingerprint(new):
                clauses.append(f"the {key} is another checkpoint")
            else:
                clauses.append(f"{key} was {old!r}, is {new!r}")
        return "; ".join(clauses)


def _is_fingerprint(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: cannot be read ({error}); delete it to do the stage again") from None


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1, default=str))
