"""What a stage did to documents: counts, bytes, tokens, seconds, and a few examples of what each rule removed."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .personal import masked

MOST_EXAMPLES = 3
"""Of each rule."""
EXAMPLE_CHARACTERS = 240
_BEFORE_CHANGE = 60
"""Characters that an example of a change shows before the first difference."""
_COMPARED = 20_000
"""Characters of a text in which a difference is looked for."""
_NUMBERS = (
    *("documents_in", "bytes_in", "tokens_in", "documents_out", "bytes_out", "tokens_out"),
    *("cpu_seconds", "wall_seconds"),
)
_COUNTERS = ("removed", "replaced", "dropped")


@dataclass
class StageTally:
    """Of one stage; tallies of parts are merged in the order of the parts."""

    documents_in: int = 0
    bytes_in: int = 0
    tokens_in: int = 0
    """0 if tokens are not counted, as of `tokens_out`."""
    documents_out: int = 0
    bytes_out: int = 0
    tokens_out: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    """Of all workers together, without the compilation of kernels."""
    removed: Counter[str] = field(default_factory=Counter)
    """Documents by the rule that removed them."""
    replaced: Counter[str] = field(default_factory=Counter)
    """What was replaced in the texts, by kind."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Lines and paragraphs that were dropped from texts that stay or not, by rule."""
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """Of the first documents that a rule removed: source, place, and how the text begins."""
    changes: list[dict[str, str]] = field(default_factory=list)
    """Of the first documents that changed: source, place, and the text around the first change, before and after."""

    def add(self, before: Any, after: Any, reasons: Any, cpu_seconds: float, wall_seconds: float = 0.0) -> None:
        """Count a batch before and after the stage, and why each document of it was removed (None: it was not)."""
        self.documents_in += len(before)
        self.bytes_in += len(before.texts.data)
        self.documents_out += len(after)
        self.bytes_out += len(after.texts.data)
        self.cpu_seconds += cpu_seconds
        self.wall_seconds += wall_seconds
        if before.tokens is not None:
            self.tokens_in += int(before.tokens.sum())
            self.tokens_out += int(after.tokens.sum())
        if reasons is None:
            return
        for index in np.flatnonzero(reasons != None).tolist():  # noqa: E711  element by element
            reason = reasons[index]
            self.removed[reason] += 1
            if len(self.examples.get(reason, ())) < MOST_EXAMPLES:
                self.example(reason, before.sources[index], before.places[index], before.texts[index])

    def example(self, reason: str, source: str, place: str, text: str) -> None:
        """Keep a removed document as an example if there are few; personal data in it is masked."""
        found = self.examples.setdefault(reason, [])
        if len(found) < MOST_EXAMPLES:
            found.append({"source": source, "place": place, "text": masked(text, EXAMPLE_CHARACTERS)})

    def change(self, source: str, place: str, before: str, after: str) -> None:
        """Keep a changed document as an example if there are few; a change of personal data alone is not shown."""
        if len(self.changes) >= MOST_EXAMPLES or before == after:
            return
        old, new = masked(before, _COMPARED), masked(after, _COMPARED)
        at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        if old == new:
            return
        first = max(0, at - _BEFORE_CHANGE)
        last = first + EXAMPLE_CHARACTERS
        self.changes.append({"source": source, "place": place, "before": old[first:last], "after": new[first:last]})

    def merge(self, other: StageTally) -> None:
        """Add the tally of a later part."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))
        for reason, found in other.examples.items():
            known = self.examples.setdefault(reason, [])
            known += found[: MOST_EXAMPLES - len(known)]
        self.changes += other.changes[: MOST_EXAMPLES - len(self.changes)]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the most frequent rules first."""
        return {**asdict(self), **{name: dict(getattr(self, name).most_common()) for name in _COUNTERS}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StageTally:
        """The reverse of `as_dict`."""
        return cls(**{**values, **{name: Counter(values[name]) for name in _COUNTERS}})
