"""All or nothing: a file or folder appears under its name when it is complete, and the old one stays until then.

A draft is written in a hidden folder next to its target, `.NAME.RANDOM.partial`, which holds a lock as long as its
process lives. The folder is removed however the work ends: at once, or, after a `kill -9`, when the next draft is made
in the same folder. The folder of a living process is never touched.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import DRAFT_SUFFIX, WriteError, writing
from .locks import DRAFT_OWNER, Lock, read_note, try_lock
from .ownership import write_record
from .targets import check_target

_PREVIOUS = "previous"
_LONGEST_NAME = 100  # bytes of the target's name in the name of a draft folder


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: a reader sees the old or the new content, never a part.

    Raises:
        WriteError: the file cannot be written; the old content stays.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, values: Any) -> None:
    """As `write_text`, of values as JSON with one field a line."""
    write_text(path, json.dumps(values, indent=1))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    with new_file(path, overwrite=True) as draft, draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_file(target: Path, *, overwrite: bool = False, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """The path of a draft that becomes the file `target` when the block succeeds, and is removed otherwise.

    The draft has the target's name, in a folder of its own that may hold other temporary files.

    Args:
        target: the file. A link is followed; missing folders above it are made.
        overwrite: replace an existing file; it stays until the draft is complete.
        sources: paths that must not be overwritten, see `check_target`.

    Raises:
        TargetError: see `check_target`.
        WriteError: the disk cannot write it.
    """
    with _draft(target, False, overwrite, tuple(sources), False) as draft:
        yield draft


@contextmanager
def new_folder(
    target: Path, *, overwrite: bool = False, sources: Iterable[Path] = (), record: bool = True
) -> Iterator[Path]:
    """As `new_file` for a folder; the draft is an empty folder.

    Args:
        target, overwrite, sources: see `new_file`.
        record: record which files were written; without a record the folder is never replaced, see `ownership`.
    """
    with _draft(target, True, overwrite, tuple(sources), record) as draft:
        draft.mkdir()
        yield draft


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder` for temporary files; it is removed when the block ends, like the folder of a draft.

    Raises:
        WriteError: the disk cannot write it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        place, lock = _begin(Path(os.path.realpath(folder)) / "scratch")
    try:
        yield place
    finally:
        _clear(place, lock, None)


@contextmanager
def _draft(target: Path, folder: bool, overwrite: bool, sources: tuple[Path, ...], record: bool) -> Iterator[Path]:
    check_target(target, folder=folder, overwrite=overwrite, sources=sources)
    final = Path(os.path.realpath(target))
    made: list[Path] = []
    try:
        with writing(target):
            _make_folders(final.parent, made)
            remove_leftovers(final.parent)
            place, lock = _begin(final)
        try:
            with _calling(place / final.name, target), writing(target):
                yield place / final.name
                check_target(target, folder=folder, overwrite=overwrite, sources=sources)
                if record:
                    write_record(place / final.name)
                _swap(place / final.name, final, place / _PREVIOUS)
        finally:
            _clear(place, lock, final)
    except BaseException:
        for path in reversed(made):
            _remove_if_empty(path)
        raise


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make `folder` and its parents; those that did not exist are added to `made`."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        made.append(place)


def _begin(final: Path) -> tuple[Path, Lock]:
    """A new folder next to `final`, and the lock in it."""
    short = final.name.encode("utf-8", "ignore")[:_LONGEST_NAME].decode("utf-8", "ignore")
    while True:
        place = final.with_name(f".{short}.{secrets.token_hex(4)}{DRAFT_SUFFIX}")
        place.mkdir()
        try:
            lock = try_lock(place / DRAFT_OWNER, target=final.name)
        except FileNotFoundError:  # another process removed it as a leftover before the lock was in it
            continue
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        if lock is not None:
            return place, lock


@contextmanager
def _calling(draft: Path, target: Path) -> Iterator[None]:
    """Make errors of the block name the target instead of the draft."""
    try:
        yield
    except Exception as error:
        error.args = tuple(a.replace(str(draft), str(target)) if isinstance(a, str) else a for a in error.args)
        if isinstance(error, OSError):
            if isinstance(error.filename, str):
                error.filename = error.filename.replace(str(draft), str(target))
            if isinstance(error, WriteError):
                error.strerror = (error.strerror or "").replace(str(draft), str(target))
        raise


def _swap(draft: Path, final: Path, previous: Path) -> None:
    """Move the draft to its target. If that fails after the old one was moved away, `_clear` moves it back."""
    if final.is_dir():
        final.rename(previous)
    draft.replace(final)


def _clear(place: Path, lock: Lock, final: Path | None) -> None:
    """Delete a draft folder, the lock last: a half-deleted one without a lock would never be cleaned up."""
    previous = place / _PREVIOUS
    if final is not None and previous.exists() and not os.path.lexists(final):
        previous.rename(final)
    for path in place.iterdir():
        if path.name == DRAFT_OWNER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    lock.release()
    _remove_if_empty(place)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Delete the draft folders in `folder` whose processes are dead, and restore what one of them was about to
    replace."""
    with suppress(OSError):
        for place in folder.glob(f".*{DRAFT_SUFFIX}"):
            if place.is_dir() and not place.is_symlink():
                with suppress(OSError):  # it belongs to another user, for instance
                    _remove_leftover(place)


def _remove_leftover(place: Path) -> None:
    owner = place / DRAFT_OWNER
    if not owner.is_file():
        _remove_if_empty(place)
        return
    name = read_note(owner).get("target")
    known = isinstance(name, str) and Path(name).name == name
    lock = try_lock(owner, target=name)
    if lock is not None:
        _clear(place, lock, place.with_name(str(name)) if known else None)
