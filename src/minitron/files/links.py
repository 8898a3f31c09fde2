"""Links in a checkpoint of a stranger: a file that is copied or read as text must belong to the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".h5"})


class LinkedFileError(ValueError):
    """A file of a checkpoint that is a link to somewhere else; the message names both."""


def leads_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, all links followed, lies in `folder`, or in the blobs of the Hugging Face cache it is part of."""
    home, found = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    return found.is_relative_to(home) or (home.parent.name == "snapshots" and found.is_relative_to(blobs))


def require_inside(path: Path, folder: Path) -> None:
    """Refuse a file of `folder` that is a link to elsewhere.

    Raises:
        LinkedFileError: it is.
    """
    if not leads_inside(path, folder):
        raise LinkedFileError(
            f"{path}: a link to {path.resolve()}, outside of the checkpoint; put the file itself there if it is meant"
        )


def require_own_files(folder: Path, below: Iterable[str] = ()) -> None:
    """Refuse links to elsewhere among the small files in a folder (not those of weights), and in folders `below` it.

    Raises:
        LinkedFileError: there is one.
    """
    for place in (folder, *(folder / name for name in below)):
        if place.is_dir():
            for path in sorted(place.iterdir()):
                if path.suffix.lower() not in _WEIGHTS and (path.is_symlink() or place.is_symlink()):
                    require_inside(path, folder)
