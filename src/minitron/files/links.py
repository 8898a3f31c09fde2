"""Links in untrusted checkpoints: a file that is copied or read as text must belong to the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".h5"})


class LinkedFileError(ValueError):
    """A file of a checkpoint that links outside of it; the message names the file and where it leads."""


def leads_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, with all links resolved, is in `folder`, or in the blobs of the Hugging Face cache it is part
    of."""
    home, found = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    return found.is_relative_to(home) or (home.parent.name == "snapshots" and found.is_relative_to(blobs))


def require_inside(path: Path, folder: Path) -> None:
    """Refuse a file of `folder` that links outside of it.

    Raises:
        LinkedFileError: the file does.
    """
    if not leads_inside(path, folder):
        raise LinkedFileError(
            f"{path}: a link to {path.resolve()}, outside of the checkpoint; if it belongs there, copy the file into it"
        )


def require_own_files(folder: Path, below: Iterable[str] = ()) -> None:
    """Refuse links that lead outside, among the small files of a folder (not the weights) and of the folders `below`
    it.

    Raises:
        LinkedFileError: there is such a link.
    """
    for place in (folder, *(folder / name for name in below)):
        if place.is_dir():
            for path in sorted(place.iterdir()):
                if path.suffix.lower() not in _WEIGHTS and (path.is_symlink() or place.is_symlink()):
                    require_inside(path, folder)
