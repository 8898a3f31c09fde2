"""What a stage did to documents: counts, bytes, seconds, and a few examples of what each rule removed."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_EXAMPLES = 3
"""Of each rule."""
EXAMPLE_CHARACTERS = 240


@dataclass
class StageTally:
    """Of one stage; tallies of parts are merged in the order of the parts."""

    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    cpu_seconds: float = 0.0
    removed: Counter[str] = field(default_factory=Counter)
    """Documents by the rule that removed them."""
    replaced: Counter[str] = field(default_factory=Counter)
    """What was replaced in the texts, by kind."""
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """Of the first documents that a rule removed: source, place, and how the text begins."""

    def add(self, before: Any, after: Any, reasons: Any, seconds: float) -> None:
        """Count a batch before and after the stage, and why each document of it was removed (None: it was not)."""
        self.documents_in += len(before)
        self.bytes_in += len(before.texts.data)
        self.documents_out += len(after)
        self.bytes_out += len(after.texts.data)
        self.cpu_seconds += seconds
        if reasons is None:
            return
        for index, reason in enumerate(reasons):
            if reason is not None:
                self.removed[reason] += 1
                self.example(reason, before.sources[index], before.places[index], before.texts[index])

    def example(self, reason: str, source: str, place: str, text: str) -> None:
        """Keep a removed document as an example if there are few."""
        found = self.examples.setdefault(reason, [])
        if len(found) < MOST_EXAMPLES:
            found.append({"source": source, "place": place, "text": text[:EXAMPLE_CHARACTERS]})

    def merge(self, other: StageTally) -> None:
        """Add the tally of a later part."""
        for name in ("documents_in", "bytes_in", "documents_out", "bytes_out", "cpu_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.removed += other.removed
        self.replaced += other.replaced
        for reason, found in other.examples.items():
            known = self.examples.setdefault(reason, [])
            known += found[: MOST_EXAMPLES - len(known)]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the most frequent rules first."""
        return {**asdict(self), "removed": dict(self.removed.most_common()), "replaced": dict(self.replaced)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StageTally:
        """The reverse of `as_dict`."""
        return cls(**{**values, "removed": Counter(values["removed"]), "replaced": Counter(values["replaced"])})
