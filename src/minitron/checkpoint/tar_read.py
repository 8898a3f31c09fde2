"""The members of an uncompressed tar as ranges of bytes, in one pass of bounded cost.

`tarfile` searches extended (PAX) headers with regular expressions whose cost grows with the square of a run of digits
(fixed in later patch releases of Python only), and it follows links, sparse maps and global headers, which a checkpoint
has no use for. Formats: POSIX ustar and pax (`man 5 pax`), GNU long names; the old format of Unix version 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .limits import MAX_ARCHIVE_HEADER, MAX_ARCHIVE_MEMBERS, CheckpointError, member_path, require
from .tensors import ByteRange

_BLOCK = 512
_FOLDER, _FILES = b"5", (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", (b"x", b"X"), b"g"


def tar_files(path: Path, shown_as: str = "") -> dict[str, ByteRange]:
    """The regular files of an uncompressed tar, as ranges of the tar itself.

    Raises:
        CheckpointError: not a tar, cut or corrupted; a member that is a link, a device or sparse, or has a path that
            leaves the archive; too many members; an extended header that is too long.
    """
    where = shown_as or str(path)
    whole = ByteRange(path, 0, path.stat().st_size, where)
    files: dict[str, ByteRange] = {}
    with path.open("rb") as file:
        for raw_name, kind, start, size in _members(file, where):
            if raw_name.rstrip("/") in ("", ".") and kind == _FOLDER:
                continue
            name = member_path(raw_name, where).as_posix()
            if kind == _FOLDER:
                continue
            plain = kind in _FILES and not raw_name.endswith("/")
            require(plain, f"{where}: {name[:80]} is a link, a device or sparse; expected plain files")
            require(name not in files, f"{where}: {name[:80]} appears twice")
            files[name] = whole.part(start, size, f"{where} ({name[:200]})")
    return files


def _members(file: BinaryIO, where: str) -> Iterator[tuple[str, bytes, int, int]]:
    """(name, kind, offset of the data, size) of each member, extended headers applied."""
    overrides: dict[str, str] = {}
    count = 0
    while True:
        header = file.read(_BLOCK)
        if count and (not header or not header.strip(b"\0")):
            return
        _check_header(header, where)
        count += 1
        require(count <= MAX_ARCHIVE_MEMBERS, f"{where}: more than {MAX_ARCHIVE_MEMBERS:,} members")
        kind, size = header[156:157], _number(header[124:136], where)
        if kind in (_LONG_NAME, _LONG_LINK, _PAX_GLOBAL, *_PAX):
            data = _extended(file, size, where)
            if kind == _LONG_NAME:
                overrides["path"] = _text(data, where)
            elif kind in _PAX:
                overrides |= _pax_records(data, where)
            continue
        name = overrides.get("path")
        if name is None:
            name = _text(header[:100], where)
            if header[257:263] == b"ustar\0" and header[345] != 0:
                name = f"{_text(header[345:500], where)}/{name}"
        if "size" in overrides:
            size = _decimal(overrides["size"], where)
        start = file.tell()
        yield name, kind, start, size
        overrides = {}
        file.seek(start + size + -size % _BLOCK if kind in _FILES else start)


def _check_header(header: bytes, where: str) -> None:
    good = len(header) == _BLOCK
    if good:
        told = header[148:156].strip(b" \0")
        total = sum(header) - sum(header[148:156]) + 8 * 32
        good = told.isdigit() and len(told) < 8 and int(told, 8) == total if set(told) <= set(b"01234567") else False
    require(good, f"{where}: not a tar, or cut or corrupted (a header without its checksum)")


def _extended(file: BinaryIO, size: int, where: str) -> bytes:
    """The data of an extended header, which belongs to the member after it."""
    most = MAX_ARCHIVE_HEADER
    require(size <= most, f"{where}: a tar header of {size:,} bytes, expected at most {most:,}; corrupted")
    data = file.read(size + -size % _BLOCK)
    require(len(data) >= size, f"{where}: not a tar, or cut or corrupted (an extended header ends too early)")
    return data[:size]


def _pax_records(data: bytes, where: str) -> dict[str, str]:
    """`path` and `size` of a PAX header: records `LENGTH KEY=VALUE\\n`, the length counting the whole record.

    Raises:
        CheckpointError: records that do not follow one another; a sparse file.
    """
    found: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 8)
        length = int(data[at:space]) if space > at and data[at:space].isdigit() else 0
        record = data[space + 1 : at + length]
        key, equals, value = record.partition(b"=")
        good = length and record.endswith(b"\n") and equals and at + length <= len(data)
        require(good, f"{where}: a PAX header of the tar is corrupted at byte {at:,}")
        require(not key.startswith(b"GNU.sparse"), f"{where}: a sparse member in the tar; expected plain files")
        if key in (b"path", b"size"):
            found[key.decode()] = _text(value[:-1], where)
        at += length
    return found


def _number(field: bytes, where: str) -> int:
    """A size: octal digits, or GNU's binary form for 8 GiB and more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    good = not digits or set(digits) <= set(b"01234567")
    require(good, f"{where}: not a tar, or cut or corrupted (a size of {digits!r})")
    return int(digits or b"0", 8)


def _decimal(text: str, where: str) -> int:
    require(text.isascii() and text.isdigit() and len(text) < 20, f"{where}: a PAX header says size {text[:40]!r}")
    return int(text)


def _text(data: bytes, where: str) -> str:
    try:
        return data.split(b"\0", 1)[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: a name in the tar is not UTF-8 ({error.reason})") from None
