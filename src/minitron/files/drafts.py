"""All or nothing: what is written becomes visible when it is complete, and what was there before stays until then.

A draft lies in a hidden folder beside its target, `.NAME.RANDOM.partial`, which holds a lock as long as its process
lives. Whatever ends the work, the folder goes: at once, or, after a `kill -9`, when the next draft is made in the same
place. The folder of a process that lives is never touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DRAFT_SUFFIX, WriteError, writing
from .locks import DRAFT_OWNER, Lock, read_note, try_lock
from .ownership import write_record
from .targets import check_target

_PREVIOUS = "previous"
_LONGEST_NAME = 100  # of the part of a draft folder's name that is the target's


def write_text(path: Path, text: str) -> None:
    """Write a small file. A reader sees the old or the new content, never a part.

    Raises:
        WriteError: it cannot be written; the old content stays.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    with new_file(path, overwrite=True) as draft, draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_file(target: Path, *, overwrite: bool = False, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """The path of a draft that becomes the file `target` when the block ends well, and vanishes otherwise.

    The draft has the target's name, in a folder of its own that may be used for further temporary files.

    Args:
        target: the file. A link is followed; missing folders above it are made.
        overwrite: replace what is there; it stays until the draft is complete.
        sources: what must not be hit, see `check_target`.

    Raises:
        TargetError: see `check_target`.
        WriteError: the disk refuses.
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
        record: write down which files were written, without which the folder is never replaced; see `ownership`.
    """
    with _draft(target, True, overwrite, tuple(sources), record) as draft:
        draft.mkdir()
        yield draft


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder` for temporary files; it goes when the block ends, as the folder of a draft does.

    Raises:
        WriteError: the disk refuses.
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
    """Make `folder` and those above it; each that was not there goes into `made`."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        made.append(place)


def _begin(final: Path) -> tuple[Path, Lock]:
    """A new folder beside `final`, and the lock in it."""
    short = final.name.encode("utf-8", "ignore")[:_LONGEST_NAME].decode("utf-8", "ignore")
    while True:
        place = final.with_name(f".{short}.{secrets.token_hex(4)}{DRAFT_SUFFIX}")
        place.mkdir()
        try:
            lock = try_lock(place / DRAFT_OWNER, target=final.name)
        except FileNotFoundError:  # taken for a leftover before the lock was in it
            continue
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        if lock is not None:
            return place, lock


@contextmanager
def _calling(draft: Path, target: Path) -> Iterator[None]:
    """Errors of the block speak of the target where they mean the draft."""
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
    """Put the draft in its place. If that fails after the old one was moved away, `_clear` moves it back."""
    if final.is_dir():
        final.rename(previous)
    draft.replace(final)


def _clear(place: Path, lock: Lock, final: Path | None) -> None:
    """Delete a draft folder, the lock last: a half deleted one without a lock would be nobody's."""
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
    """Delete the draft folders in `folder` whose processes are dead; what one was about to replace is put back."""
    with suppress(OSError):
        for place in folder.glob(f".*{DRAFT_SUFFIX}"):
            if place.is_dir() and not place.is_symlink():
                with suppress(OSError):  # of another user, for instance
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
