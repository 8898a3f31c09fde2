"""Which files a name stands for: a file, a folder with all its levels, or a pattern."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .formats import KNOWN, check_encoding, kind_of
from .problems import DataError

# Files that `datasets.Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave beside the data.
_DATASET_STATE = "state.json"
_DATASET_SPLITS = "dataset_dict.json"
_DATASET_FILES = ("dataset_info.json", "dataset_infos.json", _DATASET_SPLITS)
# Folders with these files are a checkpoint, a training run and a token cache: not text to learn from.
_OUTPUTS = (("config.json", "tokenizer.json"), ("train.json", "metrics.jsonl"), ("tokens.bin", "documents.npy"))


@dataclass(frozen=True)
class Listing:
    """The files of a source."""

    files: list[Path]
    """Sorted."""
    notes: list[str]
    """Sentences about files in a folder that were skipped."""


@dataclass(frozen=True)
class Source:
    """Text files that share a weight."""

    path: str
    """A file, a folder (searched through all levels) or a glob pattern."""
    weight: float = 1.0
    """How many times an epoch uses it; 0.5 takes one half in the first epoch, the other half in the second."""
    field: str = "text"
    """Which field, or column, holds the text, in files that have fields."""
    encoding: str = "utf-8"
    """Of files without a byte-order mark, as Python names it."""
    skip_bad: bool = False
    """Skip documents that cannot be used instead of refusing the source."""

    def __post_init__(self) -> None:
        check_encoding(self.encoding)

    @classmethod
    def parse(cls, text: str, field: str = "text", encoding: str = "utf-8", skip_bad: bool = False) -> Source:
        """Read `PATH` or `PATH:WEIGHT`."""
        whole = cls(text, field=field, encoding=encoding, skip_bad=skip_bad)
        path, colon, weight = text.rpartition(":")
        if not colon or Path(text).expanduser().exists():
            return whole
        try:
            value = float(weight)
        except ValueError:
            return whole
        if not 0 < value < float("inf"):
            raise DataError(f"data {text!r}: the weight is {weight}; it must be greater than 0 and finite")
        return replace(whole, path=path, weight=value)

    def files(self) -> list[Path]:
        """The text files, sorted; errors as of `listing`."""
        return self.listing().files

    def listing(self) -> Listing:
        """The text files, and what else is in their folders.

        In a folder, hidden files and folders (`.git`, `._a.txt`), checkpoints, training runs and files of other kinds
        are skipped; a file that is named is read, or refused.

        Raises:
            FileNotFoundError: there is none.
            DataError: a file of another kind, or a data set on disk with several splits.
        """
        if not self.path.strip():
            raise DataError("data is an empty name; it must be a file, a folder or a pattern")
        path = Path(self.path).expanduser()
        if path.is_file():
            if kind_of(path) is None:
                raise DataError(f"{path}: unknown kind of text file; known: {KNOWN}")
            return Listing([path], [])
        walk = _Walk()
        for root in [path] if path.is_dir() else sorted(map(Path, glob.glob(str(path), recursive=True))):
            walk.visit(root)
        files = sorted(walk.files)
        skipped = walk.skipped()
        if not files:
            found = f"; found only {skipped}" if skipped else ""
            raise FileNotFoundError(f"data {self.path!r}: no text file there (known: {KNOWN}){found}")
        splits = {p.parent.name: p.parent for p in files if (p.parent.parent / _DATASET_SPLITS).is_file()}
        if len(splits) > 1:
            raise DataError(
                f"{self.path}: a data set with several splits; name one, as in {next(iter(splits.values()))}"
            )
        read = "1 file is" if len(files) == 1 else f"{len(files):,} files are"
        return Listing(files, [f"{self.path}: {read} read; skipped: {skipped}"] if skipped else [])


class _Walk:
    """Collects text files, and counts the others by their suffix."""

    def __init__(self) -> None:
        self.files: set[Path] = set()
        self._others: Counter[str] = Counter()
        self._folders: set[tuple[int, int]] = set()  # by identity: links may lead around in a circle

    def visit(self, root: Path) -> None:
        """A folder, or a file that a pattern matched."""
        if not root.is_dir():
            self._add(root)
            return
        for folder, names in self._folders_below(root):
            state = "dataset_info.json" in names
            for name in names:
                if name in _DATASET_FILES or (name == _DATASET_STATE and state):
                    continue
                if not name.startswith("."):
                    self._add(folder / name)
                elif kind_of(folder / name) is not None:
                    self._others["hidden"] += 1

    def _folders_below(self, root: Path) -> Iterator[tuple[Path, list[str]]]:
        for name, inner, files in os.walk(root, onerror=_refuse, followlinks=True):
            folder = Path(name)
            status = folder.stat()
            known = (status.st_dev, status.st_ino) in self._folders
            self._folders.add((status.st_dev, status.st_ino))
            output = any(all(part in files for part in parts) for parts in _OUTPUTS)
            if known or output:
                self._others["in folders of checkpoints or runs"] += len(files) if output and not known else 0
                inner.clear()
                continue
            inner[:] = sorted(entry for entry in inner if not entry.startswith("."))
            yield folder, files

    def _add(self, path: Path) -> None:
        special = path.exists() and not path.is_file()  # a link to nothing is a file that cannot be read
        if special or kind_of(path) is None:
            self._others[path.suffix.lower() if path.suffix and not special else "of another kind"] += 1
        elif path.suffix.lower() != ".arrow" or _belongs(path):
            self.files.add(path)

    def skipped(self) -> str:
        """As in "2 .pdf, 1 hidden"; empty if nothing was."""
        return ", ".join(f"{count:,} {what}" for what, count in sorted(self._others.items()) if count)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror})")


def _belongs(path: Path) -> bool:
    """Whether an Arrow file is data; a saved data set lists its own, and beside them may lie caches of `map`."""
    state = path.parent / _DATASET_STATE
    if not state.is_file():
        return True
    try:
        return path.name in {
            entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        }
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{state}: not the state of a data set saved to disk") from None
