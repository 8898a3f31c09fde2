"""What may be written where: targets are kept apart from sources, and only our own files are replaced.

Paths are compared by the file they lead to (device and inode), so links, `..`, other spellings of a name and file
systems that ignore case make no difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from .errors import DRAFT_SUFFIX
from .locks import DRAFT_OWNER, LOCK
from .ownership import foreign_files

# Suffixes that everybody expects on a file; a folder with such a name is a mistake.
_FILE_SUFFIX = re.compile(
    r"\.(arrow|bin|ckpt|csv|distcp|gguf|ggml|gz|h5|html|json|jsonl|log|md|model|msgpack|nemo|npy|npz|onnx|parquet|pdf|pickle"
    r"|pkl|png|pt|pth|py|safetensors|svg|tar|tgz|tsv|txt|xz|yaml|yml|zip|zst)",
    re.IGNORECASE,
)
_Identity = tuple[int, int]


class TargetError(ValueError):
    """A target that must not be written; the message says why and what would be right."""


def check_target(target: Path, *, folder: bool, overwrite: bool = False, sources: Iterable[Path] = ()) -> None:
    """Refuse to write where something would be lost.

    Args:
        target: the file or folder to make. A link is followed.
        folder: whether it is a folder.
        overwrite: replace an existing target; in a folder, only files that this package wrote and nobody changed since.
        sources: paths that are read meanwhile.

    Raises:
        TargetError: the target exists and `overwrite` is false; it is a file where a folder is expected or the other
            way round; it overlaps with a source; it holds files of others; it is the current or the home folder, or
            contains one of them.
    """
    _check_kind(target, folder)
    taken = target.exists() and not (target.is_dir() and is_empty(target))
    if taken and not overwrite:
        raise TargetError(f"{target}: is there already; pass --overwrite to replace it")
    require_apart(target, sources)
    if folder and target.exists():
        _check_place(target)
        _check_files(target)


def is_empty(folder: Path, but: Collection[str] = ()) -> bool:
    """Whether a folder is empty, not counting a lock, drafts and files named in `but`."""
    return all(path.name == LOCK or path.name in but or _is_draft(path) for path in folder.iterdir())


def _is_draft(path: Path) -> bool:
    """Whether a folder holds a draft that is being made, or was left by a process that was killed."""
    return path.name.startswith(".") and path.name.endswith(DRAFT_SUFFIX) and (path / DRAFT_OWNER).is_file()


def _check_kind(target: Path, folder: bool) -> None:
    if os.path.islink(os.path.realpath(target)):
        raise TargetError(f"{target}: symbolic links that lead in a circle; choose another name")
    if target.exists() and target.is_dir() != folder:
        is_now, wanted = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise TargetError(f"{target}: is a {is_now}, and a {wanted} is to be written; choose another name")
    above = next((place for place in target.absolute().parents if place.exists()), None)
    if above is not None and not above.is_dir():
        raise TargetError(f"{target}: {above} is a file, so nothing can be written below it")


def _check_place(target: Path) -> None:
    here = _identity(target)
    for what, place in (("the current folder", Path()), ("the home folder", Path(os.path.expanduser("~")))):
        if here in _ancestors(place):
            verb = "is" if here == _identity(place) else "holds"
            raise TargetError(f"{target}: {verb} {what}; choose the name of a folder below it")
    if os.path.ismount(os.path.realpath(target)):
        raise TargetError(f"{target}: a disk is mounted there; choose the name of a folder below it")


def _check_files(target: Path) -> None:
    unknown, changed = foreign_files(target)
    if not unknown and not changed:
        return
    names = [*unknown, *changed]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    what = "was not written by minitron" if unknown else "was changed after minitron wrote it"
    if len(names) > 1:
        what = what.replace("was", "were", 1)
    raise TargetError(
        f"{target}: {shown} {what}, and --overwrite replaces only what minitron wrote; "
        f"move or delete it yourself, or choose another folder"
    )


def require_apart(target: Path, sources: Iterable[Path]) -> None:
    """Refuse a target that is a source, lies inside one, or holds one or a file that one links to.

    Raises:
        TargetError: names both.
    """
    sources = tuple(sources)
    above_target = _ancestors(target) if sources else set()
    own = _identity(target)
    for source in sources:
        found = _identity(source)
        if found is None:
            continue
        if found == own:
            raise TargetError(f"{target}: source and target are the same ({source})")
        if found in above_target:
            raise TargetError(f"{target}: lies inside {source}, which is read; choose a place outside it")
        for part in (source, *_linked(source)):
            if own is not None and own in _ancestors(part):
                verb = "is" if _identity(part) == own else "holds"
                raise TargetError(f"{target}: {verb} {part}, which is read; choose another target")


def _linked(source: Path) -> Iterator[Path]:
    """Links in a source, and files in it that have other names (hard links)."""
    if not source.is_dir():
        return
    for place, folders, files in os.walk(source):
        for entry in (*folders, *files):
            path = Path(place) / entry
            if path.is_symlink() or (entry in files and path.stat().st_nlink > 1):
                yield path


def _ancestors(path: Path) -> set[_Identity]:
    """The identities of `path` and of every folder above it, both of the path itself and of where it leads."""
    ways = [Path(os.path.realpath(path))]
    if path.name != "..":
        ways.append(Path(os.path.realpath(path.absolute().parent)) / path.name)
    if ".." not in path.parts:
        ways.append(path.absolute())
    places = {place for way in ways for place in (way, *way.parents)}
    return {identity for place in places if (identity := _identity(place)) is not None}


def _identity(path: Path) -> _Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def require_folder_name(target: Path) -> None:
    """Refuse a name with the suffix of a file for a folder that does not exist yet.

    Raises:
        TargetError: the suffix is that of a kind of file.
    """
    if _FILE_SUFFIX.fullmatch(target.suffix) and not target.exists():
        raise TargetError(
            f"{target}: {target.suffix} is the suffix of a file, and a folder is to be written; "
            f"leave it out: {target.with_suffix('')}"
        )
