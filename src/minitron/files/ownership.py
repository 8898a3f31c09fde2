"""A record in a folder of the files that this package wrote there, so that `--overwrite` deletes nothing else.

The record holds the size and a digest of every file, so that a file that was edited or trained further is recognized as
changed. For a large file it holds digests of samples and the time of its last change: an edit between the samples shows
by its time. A copy of a large file counts as changed unless its time was kept (`cp -p`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

RECORD = ".minitron-files.json"
_VERSION = 2
_SAMPLE_BYTES = 1 << 18
_SAMPLES = 5


def write_record(folder: Path) -> None:
    """Record the files that are in `folder` now."""
    files = {path.relative_to(folder).as_posix(): _facts(path) for path in _entries(folder)}
    text = json.dumps({"version": _VERSION, "files": files}, indent=1) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")


def foreign_files(folder: Path) -> tuple[list[str], list[str]]:
    """(files that are not in the record, files that were changed since), as paths within `folder`.

    Without a record every file is unknown.
    """
    known = _read(folder)
    unknown, changed = [], []
    for path in _entries(folder):
        name = path.relative_to(folder).as_posix()
        if name not in known:
            unknown.append(name)
        elif path.is_symlink() or known[name] != _facts(path):
            changed.append(name)
    return unknown, changed


def _read(folder: Path) -> dict[str, list[object]]:
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return dict(values["files"]) if values["version"] == _VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _entries(folder: Path) -> Iterator[Path]:
    """Everything but plain folders and the record itself; links to folders are included."""
    for place, folders, files in os.walk(folder):
        for name in sorted((*files, *(n for n in folders if (Path(place) / n).is_symlink()))):
            path = Path(place) / name
            if path != folder / RECORD:
                yield path


def _facts(path: Path) -> list[object]:
    """[size, digest]; for a large file [size, digest of samples spread over it, time]; for a pipe or a device
    nothing."""
    if not path.is_file():
        return []
    found = path.stat()
    size = found.st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(_SAMPLES):
                file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
            return [size, digest.hexdigest(), found.st_mtime_ns]
    return [size, digest.hexdigest()]
