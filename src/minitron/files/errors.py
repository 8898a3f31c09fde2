"""Clear messages for failures of the disk: which file, what is wrong, how many bytes.

The operating system names no file when a write fails, and libraries wrap its errors in their own types.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large (the file system's limit, or that of `ulimit -f`)",
}
_FORBIDDEN = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EEXIST: "a file is in the place of the folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its symbolic links lead in a circle",
}
# What libraries that do not raise OSError say: safetensors (Rust), SQLite, PyTorch's writers.
_PHRASES = {
    "no space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "readonly database": errno.EROFS,
    "permission denied": errno.EACCES,
}


DRAFT_SUFFIX = ".partial"
"""Ends the names of the hidden folders that hold drafts; see `drafts`."""


class WriteError(OSError):
    """A file that cannot be written. The message names the path, the reason and, if the disk is full, the free
    bytes."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(code, sentence)

    def __str__(self) -> str:
        return self.strerror or ""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the disk in the block, from any library, into a message about `path`.

    Raises:
        WriteError: instead of such an error; all others pass through.
    """
    try:
        yield
    except Exception as error:
        code = _code(error, path)
        if code is None or isinstance(error, WriteError):
            raise
        raise WriteError(code, f"{path}: cannot be written: {explain(error, path)}") from None


def explain(error: BaseException, path: Path) -> str:
    """Why something could not be written to `path`: one line, with the free bytes if there are too few."""
    if isinstance(error, WriteError):
        return str(error)
    code = _code(error, path)
    if code in _NO_ROOM:
        return f"{_NO_ROOM[code]}; {free_bytes(path):,} bytes are free on this disk"
    if code is not None:
        return _FORBIDDEN[code]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _code(error: BaseException, path: Path) -> int | None:
    """The `errno` of a failed write at `path`; None if the error is something else."""
    if not isinstance(error, OSError):
        text = str(error).lower()
        return next((code for phrase, code in _PHRASES.items() if phrase in text), None)
    if error.errno is None:  # NumPy's tofile says "4096 requested and 0 written"
        return errno.ENOSPC if str(error).endswith(" written") else None
    if error.errno in _FORBIDDEN:  # perhaps about another file that could not be read
        return error.errno if error.filename is None or _is_near(error.filename, path) else None
    return error.errno if error.errno in _NO_ROOM else None


def _is_near(name: str | bytes, path: Path) -> bool:
    place, path = Path(os.fsdecode(name)).absolute(), path.absolute()
    in_a_draft = any(part.endswith(DRAFT_SUFFIX) for part in place.parts)
    return in_a_draft or place.is_relative_to(path) or path.is_relative_to(place)


def free_bytes(path: Path) -> int:
    """Free bytes for this user on the disk of `path`, which need not exist."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def written_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def require_space(path: Path, needed: int) -> None:
    """Refuse to write what cannot fit, before the first byte.

    Raises:
        WriteError: fewer than `needed` bytes are free on the disk of `path`.
    """
    free = free_bytes(path)
    if free < needed:
        raise WriteError(errno.ENOSPC, f"{path}: needs {needed:,} bytes, and {free:,} bytes are free on this disk")


def allocate(path: Path, size: int) -> None:
    """Make a file of `size` bytes with all its blocks reserved, for mapping into memory.

    Writing to a mapped sparse file kills the process (SIGBUS) when the disk is full; a file with reserved blocks does
    not.

    Raises:
        WriteError: the disk has no room for it; nothing is left behind.
    """
    with writing(path), path.open("wb") as file:
        try:
            _reserve(file.fileno(), size)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, max(1, size))
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        block = bytes(1 << 20)
        for start in range(0, size, len(block)):
            os.write(descriptor, block[: size - start])
