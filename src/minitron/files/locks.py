"""One process in a folder at a time.

The lock is `flock` on a file. The kernel releases it however the process ends, so no lock outlives a `kill -9`. On NFS,
Linux does the same with the server's locks. Where a file system has no locks (some mounts of NFS and Lustre), the note
in the file decides: a process of this machine is looked up by its number and start time; one of another machine cannot
be looked up, and counts as alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import writing

LOCK = ".lock"
DRAFT_OWNER = "owner.lock"
"""The lock of a folder in which a draft is made; see `drafts`."""
_UNKNOWN_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class LockedError(ValueError):
    """A folder that another process is using; the message names the process."""


class Lock:
    """A file that this process holds; `release` deletes it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    def release(self) -> None:
        """Release the lock. The file is deleted first, while no other process can hold it."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def try_lock(path: Path, **note: Any) -> Lock | None:
    """Lock `path`, which is made if it does not exist; None if another process holds it.

    Args:
        path: the lock file.
        note: further JSON values for the note in it.

    Raises:
        OSError: the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _take(descriptor, path):
                os.close(descriptor)
                return None
            if _is_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps({**_me(), **note}).encode(), 0)
                return Lock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner deleted it in between: try again


def _take(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNKNOWN_HERE:
            raise
        return not is_alive(read_note(path))
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def read_note(path: Path) -> dict[str, Any]:
    """The holder's note in a lock file; empty if nothing can be read."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _me() -> dict[str, Any]:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]) if sys.argv else ""
    return {"pid": os.getpid(), "started": _start_time(os.getpid()), "host": socket.gethostname(), "command": command}


def is_alive(note: dict[str, Any]) -> bool:
    """Whether the process of a note still runs, as far as this machine can tell; an empty note belongs to no
    process."""
    pid = note.get("pid")
    if not isinstance(pid, int):
        return False
    if note.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return note.get("started") == _start_time(pid)  # otherwise another process has the number by now


def _start_time(pid: int) -> int | None:
    """Clock ticks from the machine's start to the process's; None where there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder` while the block runs. A missing folder is made, and removed if it is empty
    at the end.

    Raises:
        LockedError: another process is using it.
        WriteError: the lock file cannot be made.
    """
    path = folder / LOCK
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(path)
    if lock is None:
        raise _refusal(folder)
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # up to the first that is not empty
            for place in missing:
                place.rmdir()


def require_unlocked(folder: Path) -> None:
    """Fail early if a folder is in use; the work itself still needs `locked`. Leaves nothing behind.

    Raises:
        LockedError: another process is using it.
    """
    path = folder / LOCK
    if not path.exists():
        return
    with writing(path):
        lock = try_lock(path)
    if lock is None:
        raise _refusal(folder)
    lock.release()


def _refusal(folder: Path) -> LockedError:
    note = read_note(folder / LOCK)
    who = f"process {note['pid']} on {note.get('host')}" if "pid" in note else "its process is not known"
    command = f", `{note['command']}`" if note.get("command") else ""
    return LockedError(
        f"{folder}: another run is at work in this folder ({who}{command}); wait until it ends, stop it, or choose "
        f"another folder"
    )
