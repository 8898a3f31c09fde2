"""Problems of texts, collected while they are read, so that one message names every bad file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

MOST_LISTED = 20
"""Problems that a message names; the others are counted."""
MOST_OF_A_FILE = 100
"""Problems after which the rest of a file is not read, unless bad documents are skipped."""
MOST_OF_ALL = 1000
"""Problems after which nothing more is read, unless bad documents are skipped."""


class DataError(ValueError):
    """Text or a token cache that cannot be used; the message names the file and what would be right."""


@dataclass(frozen=True)
class Problem:
    """Why a document cannot be used."""

    path: Path
    place: str
    """Where in the file, as in "line 3"; empty if it is the file as a whole."""
    what: str

    def __str__(self) -> str:
        return f"{self.path}{', ' if self.place else ''}{self.place}: {self.what}"


@dataclass(frozen=True)
class Bad:
    """Takes the place of a document, and says why there is none."""

    what: str


class BadFileError(Exception):
    """Why no more documents can be read from a file; never raised outside this package."""


class BadTextError(DataError):
    """Documents that cannot be used: one message for all of them, with a line for each."""

    keeps_lines = True
    """A program that shows the message should keep its line breaks."""

    def with_advice(self, advice: str) -> BadTextError:
        """The same error with advice on what to do."""
        return BadTextError(f"{self}\n{advice}" if "\n" in str(self) else f"{self}; {advice}")


@dataclass
class Problems:
    """Collects problems, and counts what was skipped."""

    skip: bool = False
    """Whether bad documents are skipped; otherwise `raise_any` refuses them."""
    refused: int = 0
    """Problems of other sources, because of which everything is refused already."""
    listed: list[Problem] = field(default_factory=list)
    of_file: Counter[Path] = field(default_factory=Counter)
    empty: int = 0
    """Documents without anything but white space."""
    stopped: bool = False
    """Whether reading stopped before the end."""

    @property
    def count(self) -> int:
        """How many there are."""
        return self.of_file.total()

    def add(self, problem: Problem) -> bool:
        """Record a problem; whether the rest of the file should be read."""
        self.of_file[problem.path] += 1
        if len(self.listed) < MOST_LISTED:
            self.listed.append(problem)
        enough = not self.skip and (self.of_file[problem.path] >= MOST_OF_A_FILE or self.full)
        self.stopped |= enough
        return not enough

    @property
    def full(self) -> bool:
        """Whether there are so many that reading can stop."""
        return not self.skip and self.refused + self.count >= MOST_OF_ALL

    @property
    def refuses(self) -> bool:
        """Whether the text is refused, so that it is only read for further problems."""
        return bool(self.refused or (self.count and not self.skip))

    def merge(self, other: Problems) -> None:
        """Add what another collection refuses."""
        if not other.skip:
            self.listed += other.listed[: MOST_LISTED - len(self.listed)]
            self.of_file += other.of_file
            self.stopped |= other.stopped

    def raise_any(self) -> None:
        """Refuse the text if there are problems, unless bad documents are skipped.

        Raises:
            BadTextError: there is a problem.
        """
        if not self.count or self.skip:
            return
        if self.count == 1:
            raise BadTextError(str(self.listed[0]))
        rest = self.count - len(self.listed)
        more = " or more" if self.stopped else ""
        raise BadTextError(
            "\n  ".join(
                [
                    f"{self.count:,}{more} documents in {_files(len(self.of_file))} cannot be used:",
                    *map(str, self.listed),
                    *([f"and {rest:,}{more} others"] if rest else []),
                ]
            )
        )

    def notes(self) -> list[str]:
        """Sentences about what was skipped."""
        notes = []
        if self.empty:
            notes.append(f"{self.empty:,} documents hold nothing but white space and were skipped")
        if self.count:
            rest = self.count - len(self.listed)
            named = "; ".join([*map(str, self.listed), *([f"and {rest:,} more"] if rest else [])])
            notes.append(f"{self.count:,} bad documents in {_files(len(self.of_file))} were skipped: {named}")
        return notes


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"
