"""Failures of the disk name the file and the bytes, whichever library met them."""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minitron.files import WriteError, allocate, new_folder, require_space, write_text, writing

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def refuse_large_files(action: Callable[[], object]) -> str:
    """What an action says when no file may grow beyond 4 kB: the kernel refuses as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(WriteError) as caught:
            action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return str(caught.value)


def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")
    text = refuse_large_files(lambda: write_text(path, "x" * 100_000))
    assert text.startswith(f"{path}: cannot be written: File too large")
    assert "bytes are free on this disk" in text
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_safetensors_that_do_not_fit(tmp_path: Path) -> None:
    def save() -> None:
        with new_folder(tmp_path / "out") as draft:
            save_file({"x": torch.zeros(100_000)}, draft / "model.safetensors")

    assert refuse_large_files(save).startswith(f"{tmp_path / 'out'}: cannot be written: ")
    assert not list(tmp_path.iterdir())


@needs_full
def test_full_disks_as_several_libraries_tell_of_them(tmp_path: Path) -> None:
    def numpys() -> None:
        with FULL.open("r+b") as file:
            np.zeros(100_000).tofile(file)

    def rusts() -> None:
        raise RuntimeError('Error while serializing: I/O error: Os { message: "No space left on device" }')

    for action in (lambda: FULL.write_text("x"), numpys, rusts):
        says = r"No space left on device; [0-9,]+ bytes are free"
        with pytest.raises(WriteError, match=says) as caught, writing(tmp_path / "file"):
            action()
        assert str(caught.value).startswith(str(tmp_path / "file"))
        assert caught.value.errno == errno.ENOSPC


def test_sqlite_says_it_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No space left"), writing(tmp_path / "answers.sqlite"):
        raise sqlite3.OperationalError("database or disk is full")


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "file"):
        (tmp_path / "missing").read_text()
    with pytest.raises(PermissionError), writing(tmp_path / "file"):  # of a file that is read
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/source")
    with pytest.raises(RuntimeError, match="shape"), writing(tmp_path / "file"):
        raise RuntimeError("shape mismatch")
    with pytest.raises(WriteError, match="no permission"), writing(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))


def test_room_is_asked_for_beforehand(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(WriteError, match=r"/there: needs 1,152,921,504,606,846,976 bytes, and [0-9,]+ bytes are free"):
        require_space(tmp_path / "not" / "there", 1 << 60)


def test_files_to_be_mapped_have_their_room(tmp_path: Path) -> None:
    allocate(tmp_path / "file", 1 << 20)
    assert (tmp_path / "file").stat().st_blocks * 512 >= 1 << 20
    assert "other: cannot be written" in refuse_large_files(lambda: allocate(tmp_path / "other", 1 << 20))
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root, to mount a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    code = f"""
import ctypes, sys
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None):
    sys.exit(77)
if libc.mount(b"tmpfs", {os.fsencode(tmp_path)!r}, b"tmpfs", 0, b"size=256k"):
    sys.exit(77)
import torch
from safetensors.torch import save_file
from minitron.files import WriteError, allocate, new_folder, write_text
place = Path({str(tmp_path)!r})
write_text(place / "old", "old")
def model(draft):
    save_file({{"x": torch.zeros(100_000)}}, draft / "model.safetensors")
def folder():
    with new_folder(place / "out") as draft:
        model(draft)
for action in (folder, lambda: write_text(place / "old", "x" * 400_000), lambda: allocate(place / "map", 1 << 20)):
    try:
        action()
    except WriteError as error:
        print(error)
    else:
        sys.exit("it fitted")
    assert [p.name for p in place.iterdir()] == ["old"], list(place.iterdir())
assert (place / "old").read_text() == "old"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip("no right to mount")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(str(tmp_path) in line and "No space left on device" in line for line in lines)
