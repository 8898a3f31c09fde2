"""One view of a folder or a tar: names to ranges of bytes, without unpacking.

A `.nemo` file is a tar. Its members are read in place, so no path from an archive is ever created on disk; hostile
members are refused all the same. A gzip archive (NeMo before 1.7) is inflated once, into a temporary file.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..files import require_space, scratch_folder, writing
from .limits import MAX_ARCHIVE_MEMBERS, MAX_INFLATION, MIN_INFLATED_BYTES, CheckpointError, require
from .tar_read import tar_files
from .tensors import ByteRange

Files = dict[str, ByteRange]
"""Relative posix path -> bytes."""


@contextmanager
def open_archive(path: Path, scratch: Path) -> Iterator[Files]:
    """The files of a folder, a tar or a gzip tar. A gzip tar is inflated into `scratch` while the block runs.

    Raises:
        CheckpointError: not a tar; a member that is a link, a device, or has a path that leaves the archive; an
            archive that inflates to too much.
    """
    require(path.exists(), f"{path}: no such file or folder")
    if path.is_dir():
        yield folder_files(path)
        return
    with path.open("rb") as file:
        magic = file.read(2)
    if magic != b"\x1f\x8b":
        yield tar_files(path)
        return
    with scratch_folder(scratch) as place:
        inflated = place / "inflated.tar"
        with writing(inflated), inflated.open("wb") as out:
            _inflate(path, out)
        yield tar_files(inflated, shown_as=str(path))


def folder_files(folder: Path) -> Files:
    """All regular files under `folder`."""
    files: Files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            require(len(files) < MAX_ARCHIVE_MEMBERS, f"{folder}: more than {MAX_ARCHIVE_MEMBERS:,} files")
            files[path.relative_to(folder).as_posix()] = ByteRange.whole(path)
    return files


def _inflate(path: Path, out: BinaryIO) -> None:
    """Write the contents of a gzip file to `out`, up to a limit that follows from its size."""
    limit = max(MIN_INFLATED_BYTES, MAX_INFLATION * path.stat().st_size)
    inflater = zlib.decompressobj(wbits=31)
    total = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            require_space(Path(out.name), 1 << 26)
            while piece:
                try:
                    data = inflater.decompress(piece, 1 << 22)
                except zlib.error as error:
                    raise CheckpointError(f"{path}: corrupted gzip data ({error})") from None
                total += len(data)
                require(total <= limit, f"{path}: inflates to more than {limit:,} bytes; refused as an archive bomb")
                out.write(data)
                if inflater.eof:
                    return
                piece = inflater.unconsumed_tail
    raise CheckpointError(f"{path}: the gzip data ends too early; the file is cut")


class FolderSink:
    """A folder to which an export writes its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file to write, seekable."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            yield file


class TarSink:
    """An uncompressed tar to which an export writes its files; its members grow in place.

    The header of a member is written when its size is known, which needs a seekable target.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._folders: set[str] = set()

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A member to write, seekable from where it starts."""
        folder, _, _ = name.rpartition("/")
        if folder and folder not in self._folders:
            self._folders.add(folder)
            self._header(f"./{folder}", 0, tarfile.DIRTYPE, 0o755)
        place = self._file.tell()
        self._header(f"./{name}", 0)
        start = self._file.tell()
        yield cast("BinaryIO", _Member(self._file, start))
        end = self._file.seek(0, os.SEEK_END)
        self._file.write(b"\0" * (-(end - start) % tarfile.BLOCKSIZE))
        after = self._file.tell()
        self._file.seek(place)
        self._header(f"./{name}", end - start)
        require(self._file.tell() == start, f"{name}: the tar header changed its length")
        self._file.seek(after)

    def _header(self, name: str, size: int, kind: bytes = tarfile.REGTYPE, mode: int = 0o644) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.mode = size, kind, mode
        self._file.write(info.tobuf(tarfile.GNU_FORMAT))

    def __enter__(self) -> TarSink:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Write the end of the archive, unless an error cut it short; close the file."""
        with self._file:
            if kind is None:
                end = self._file.seek(0, os.SEEK_END)
                self._file.write(b"\0" * (2 * tarfile.BLOCKSIZE))
                self._file.write(b"\0" * (-(end + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE))


class _Member:
    """The growing end of a tar, with positions counted from the start of the member."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + self._start if whence == 0 else offset, whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def flush(self) -> None:
        self._file.flush()
