"""Checkpoints of a training run: folders `step-N` that are either whole or not there.

Everything is written to a temporary folder, synced to disk and renamed, so that no moment of a crash leaves a folder
that looks complete and is not. A damaged one (a lost disk block, a truncated copy) is found by its checksums. This file
knows tensors and JSON; which model and optimizer they belong to is up to the caller.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.limits import CheckpointError
from ..files import explain, write_json

STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_NAME = re.compile(r"step-(\d+)$")


def list_steps(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in a run folder, oldest first."""
    return sorted((int(match[1]), path) for path in run.glob("step-*") if (match := _NAME.match(path.name)))


def save_step(
    run: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor], write_model: Callable[[Path], None]
) -> Path:
    """Write `run/step-N` with the model, the tensors of the optimizer, and `state` as JSON.

    Args:
        run: the run folder.
        step: N.
        state: anything JSON can hold.
        tensors: optimizer state by name.
        write_model: writes weights and whatever makes them loadable into the folder it is given.

    Raises:
        CheckpointError: it cannot be written, for instance because the disk is full. Older checkpoints stay as they
            are, and the unfinished one is removed.
    """
    try:
        work = begin_step(run, step)
        write_model(work)
        save_file(dict(tensors), work / OPTIMIZER_FILE)
        return finish_step(run, step, state)
    except (OSError, SafetensorError) as error:
        raise failed_step(run, step, error) from None
    except BaseException:
        drop_step(run, step)
        raise


def begin_step(run: Path, step: int) -> Path:
    """An empty folder in which the checkpoint of a step can be written."""
    work = _work_folder(run, step)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def finish_step(run: Path, step: int, state: Mapping[str, Any], sha256: Mapping[str, str] | None = None) -> Path:
    """Turn the folder of `begin_step` into a checkpoint: checksums, sync, rename.

    Args:
        run: the run folder.
        step: the step.
        state: anything JSON can hold.
        sha256: checksums that are known already, by path in the folder.
    """
    final, work = run / f"step-{step}", _work_folder(run, step)
    files = sorted(path for path in work.rglob("*") if path.is_file())
    known = sha256 or {}
    sums = {name: known.get(name) or file_sha256(p) for p in files for name in (str(p.relative_to(work)),)}
    record = {"step": step, "state": dict(state), "sha256": sums}
    write_json(work / STATE_FILE, record)
    for path in (*files, *{p.parent for p in files}, work):
        _sync(path)
    if final.exists():  # a damaged one of the same step, skipped when the run was resumed
        shutil.rmtree(final)
    work.rename(final)
    _sync(run)
    return final


def failed_step(run: Path, step: int, error: Exception) -> CheckpointError:
    """Remove an unfinished checkpoint; the error to raise, which names the one that is left."""
    reason = explain(error, run / f"step-{step}")
    drop_step(run, step)
    steps = list_steps(run)
    left = f"{steps[-1][1]} is intact and the run continues from it" if steps else "there is none before it"
    return CheckpointError(f"{run / f'step-{step}'}: the checkpoint could not be written ({reason}); {left}")


def drop_step(run: Path, step: int) -> None:
    """Remove an unfinished checkpoint."""
    shutil.rmtree(_work_folder(run, step), ignore_errors=True)


def _work_folder(run: Path, step: int) -> Path:
    return run / f".step-{step}.tmp"


def check_step(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after comparing every file with its checksum.

    Raises:
        CheckpointError: a file is missing or is not what was written.
    """
    try:
        record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        wanted, state = dict(record["sha256"]), record["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE}: cannot be read ({error})") from None
    for name, digest in wanted.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if file_sha256(path) != digest:
            raise CheckpointError(f"{path}: its content is not what was written; the file is damaged or truncated")
    return state


def load_step(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state, optimizer tensors) of a checkpoint written by `save_step`, checked as by `check_step`."""
    return check_step(folder), load_file(folder / OPTIMIZER_FILE)


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, None if there is none, and what is wrong with the newer ones."""
    problems = []
    for _, folder in reversed(list_steps(run)):
        try:
            check_step(folder)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return folder, problems
    return None, problems


def remove_old(run: Path, keep: int, spare: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and that of step `spare`, and what crashes left behind."""
    for step, folder in list_steps(run)[:-keep]:
        if step != spare:
            # Renamed first: a folder that is half deleted must not look like a checkpoint.
            shutil.rmtree(folder.rename(run / f".{folder.name}.old"))
    for left in (*run.glob(".step-*.tmp"), *run.glob(".step-*.old")):
        shutil.rmtree(left, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
