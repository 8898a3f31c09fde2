"""The stages of a run: each has a folder, does its work once, and leaves a note when it is done.

A note has no path outside the run folder, so that the folder can be copied to another machine and continued there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from ..train.text_changes import text_changes
from ..world import World

DONE = "stage.json"
CLOCK = "seconds.json"


class RunError(ValueError):
    """A run folder that cannot be continued."""


class StoppedError(Exception):
    """A signal ended the run early, with everything saved; the same call continues it."""


class Stages:
    """The stages of one run folder, in the order in which they are asked for.

    Args:
        folder: of the run.
        say: called with what begins, what continues and what is done already.
        texts: `origins` of the stream, which explains why a stage is not the same.
        world: the processes of the run. All call `run` alike; the first one reads and writes the notes.
    """

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], None],
        texts: Sequence[Mapping[str, Any]] | None = None,
        world: World | None = None,
    ) -> None:
        self.folder, self.say, self.texts, self.world = folder, say, texts, world or World()
        self.facts: dict[str, dict[str, Any]] = {}
        """What each stage found, by its name; JSON values."""
        self.seconds: dict[str, float] = {}
        """Time of each stage in all calls."""

    def run(self, name: str, inputs: Mapping[str, Any], work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Do a stage, or return what it found when it was done before.

        Args:
            name: of the folder below the run folder; may have parts, as in "step-1/prune".
            inputs: what the result depends on; JSON values.
            work: does it in the folder it is given, and returns what it found, JSON values. Every process calls it.
                After an interruption it is called again in the same folder and continues from what it finds there.

        Raises:
            RunError: the stage was done with other inputs.
        """
        folder = self.folder / name
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        done, before = self.world.first_does(lambda: self._open(folder, digest, inputs))
        if done is not None:
            self.facts[name], self.seconds[name] = done["facts"], done["seconds"]
            self.say(f"{name}: done before")
            return self.facts[name]
        self.say(f"{name}: {'continues' if before else 'begins'}")
        clock, began = folder / CLOCK, time.monotonic()
        try:
            facts = self.world.agree(work(folder))
        finally:
            spent = before + time.monotonic() - began
            if self.world.first:
                _write(clock, {"seconds": spent})
        note = {"inputs": digest, "given": inputs, "texts": self.texts, "facts": facts, "seconds": spent}
        self.world.first_does(lambda: _finish(folder, note))
        self.facts[name], self.seconds[name] = facts, spent
        return facts

    def _open(self, folder: Path, digest: str, inputs: Mapping[str, Any]) -> tuple[dict[str, Any] | None, float]:
        """The note of a stage that is done, and the seconds that were spent on one that is not."""
        note = folder / DONE
        if note.is_file():
            values = _read(note)
            if values.get("inputs") != digest:
                raise RunError(
                    f"{folder} was made with other inputs than those of this call "
                    f"({self._difference(values, inputs)}); choose another run folder, or delete that one to do the "
                    f"stage again"
                )
            return values, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        clock = folder / CLOCK
        return None, _read(clock).get("seconds", 0.0) if clock.is_file() else 0.0

    def _difference(self, note: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
        """What has changed since the stage was done."""
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


def _finish(folder: Path, note: Mapping[str, Any]) -> None:
    _write(folder / DONE, note)
    (folder / CLOCK).unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: cannot be read ({error}); delete it to do the stage again") from None


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1, default=str))
