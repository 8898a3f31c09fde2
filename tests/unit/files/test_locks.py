"""One process in a folder; a dead one keeps nobody out."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minitron.files import LockedError, WriteError, locked, locks, require_unlocked

HOLDER = """
import sys
from pathlib import Path
from minitron.files import locked
with locked(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        if process.poll() is None:
            process.communicate("")


def test_a_second_one_is_told_who_the_first_is(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        for attempt in (lambda: locked(tmp_path).__enter__(), lambda: require_unlocked(tmp_path)):
            with pytest.raises(LockedError, match=f"{tmp_path}: another run is at work in this folder") as caught:
                attempt()
            assert f"process {process.pid} on " in str(caught.value)
    with locked(tmp_path):
        pass
    require_unlocked(tmp_path)
    assert not list(tmp_path.iterdir())


def test_within_one_process_too(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(LockedError), locked(tmp_path):
            pass
        with pytest.raises(LockedError):
            require_unlocked(tmp_path)
    with locked(tmp_path):
        pass


def test_a_killed_one_keeps_nobody_out(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / locks.LOCK).exists()
    require_unlocked(tmp_path)
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_copied_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / locks.LOCK).write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere"}))
    with locked(tmp_path):
        pass


def test_where_the_file_system_has_no_locks_the_note_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    me = json.loads(json.dumps(locks._me()))
    with locked(tmp_path), pytest.raises(LockedError, match=f"process {os.getpid()}"), locked(tmp_path):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for note, free in (
        ({**me, "pid": ended.pid}, True),
        ({**me, "started": 1}, True),  # the number belongs to another process now
        ({}, True),
        ({**me, "host": "elsewhere", "pid": ended.pid}, False),
        (me, False),
    ):
        (tmp_path / locks.LOCK).write_text(json.dumps(note))
        if free:
            with locked(tmp_path):
                pass
        else:
            with pytest.raises(LockedError), locked(tmp_path):
                pass


def test_a_lock_file_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, flags: int, mode: int = 0) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(locks.os, "open", refuse)
    with pytest.raises(WriteError, match=r"\.lock: cannot be written: the file system is read-only"), locked(tmp_path):
        pass
