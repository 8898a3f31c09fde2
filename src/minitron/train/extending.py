"""Making a finished or interrupted run longer: from which checkpoint, and whether a longer run would have been there.

The learning rate of `constant` does not depend on the length of a run, and that of `wsd` not before it begins to go
down. From such a checkpoint the longer run is what it would have been from its start, bit for bit. A cosine depends on
the length from its first step: it can be lengthened too, and a note says that the result differs.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoint.limits import CheckpointError
from ..files import check_target
from .resume import check_step, list_steps
from .schedule import TrainConfig, learning_rate, progress

LENGTHS = ("steps", "tokens", "hours")
MODEL_FOLDER = "model"
"""The trained model of a finished run, in its folder."""


class TrainError(ValueError):
    """A run that cannot start or continue."""


@dataclass(frozen=True)
class Extension:
    """How a run becomes longer."""

    step: int
    """The checkpoint that it continues from."""
    last: int
    """The newest checkpoint of the shorter run."""
    note: str
    """What is kept, in a sentence."""
    record: dict[str, Any]
    """The same for JSON."""

    def rewind(self, run: Path) -> None:
        """Set the model of the shorter run aside, and remove checkpoints that are not part of the longer one."""
        finished = run / MODEL_FOLDER
        if finished.exists():
            aside = run / f"{MODEL_FOLDER}-step-{self.last}"
            check_target(aside, folder=True, overwrite=True)
            shutil.rmtree(aside, ignore_errors=True)
            finished.rename(aside)
        for step, folder in reversed(list_steps(run)):
            if step > self.step:
                # Renamed first, because a folder that is half deleted must not look like a checkpoint.
                shutil.rmtree(folder.rename(run / f".{folder.name}.old"))


def plan_extension(run: Path, before: Mapping[str, Any], now: Mapping[str, Any], wanted: bool) -> Extension:
    """How the run in a folder, with settings `before`, becomes one of another length; nothing is changed.

    Args:
        run: the run folder.
        before: the settings of its run, from JSON.
        now: the same settings with another length.
        wanted: whether the user asked for it.

    Raises:
        TrainError: the user did not, or the new length is not longer, or no checkpoint is whole.
    """
    old, new = _config(before), _config(now)
    lengths = f"{_length(old)}, {_length(new)} {'are' if (new.hours is None) else 'is'} asked for"
    if (old.hours is None) != (new.hours is None):
        raise TrainError(
            f"{run} holds a run of {lengths}; a run that counts in hours is lengthened in hours, others in steps or "
            f"tokens"
        )
    if not _amount(old) < _amount(new):
        raise TrainError(f"{run} holds a run of {lengths}; a run can be lengthened, not shortened")
    if not wanted:
        raise TrainError(f"{run} holds a run of {lengths}; --extend lengthens it")
    whole = _whole_checkpoints(run)
    if not whole:
        raise TrainError(f"no checkpoint in {run} is whole, so the run cannot be lengthened")
    last = whole[-1][0]
    same = [(step, state) for step, state in whole if _has_same_rates(new, step, state)]
    step, state = same[-1] if same else whole[-1]
    done = progress(new, step, state["seconds"])
    rate = learning_rate(new, step, done)
    if same:
        back = f", the last before the learning rate went down (it was at {last})" if step < last else ""
        what = f"so far it is the same as a run of {_length(new)}"
    else:
        back = ""
        what = (
            f"its steps so far had the learning rates of {_length(old)}, and from here it has those of {_length(new)}, "
            f"now {rate:.3g}: the result is not that of a run of {_length(new)} from the start"
        )
    finished = f"; its model is kept as {MODEL_FOLDER}-step-{last}" if (run / MODEL_FOLDER).exists() else ""
    note = f"lengthened from {_length(old)} to {_length(new)}, continuing from step {step}{back}; {what}{finished}"
    record = {"from": _length(old), "to": _length(new), "step": step, "as_from_the_start": bool(same)}
    return Extension(step, last, note, record)


def _has_same_rates(config: TrainConfig, step: int, state: Mapping[str, Any]) -> bool:
    """Whether all steps before a checkpoint had the learning rates that a longer run has there."""
    if config.schedule == "constant":
        return True
    return config.schedule == "wsd" and state["decay_step"] in (None, step)


def _whole_checkpoints(run: Path) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for step, folder in list_steps(run):
        try:
            found.append((step, check_step(folder)))
        except CheckpointError:
            continue
    return found


def _config(values: Mapping[str, Any]) -> TrainConfig:
    known = {f.name for f in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in values.items() if name in known})


def _amount(config: TrainConfig) -> float:
    """Length in hours or in steps."""
    return config.hours if config.hours is not None else float(config.total_steps or 0)


def _length(config: TrainConfig) -> str:
    if config.hours is not None:
        return f"{config.hours:g} hours"
    return f"{config.steps:,} steps" if config.steps is not None else f"{config.tokens:,} tokens"
