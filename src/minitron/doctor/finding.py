"""One result of an examination."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "note", "problem", "unknown"]


@dataclass(frozen=True)
class Finding:
    """What was found about one subject."""

    subject: str
    status: Status
    """`note`: works, and could be better. `problem`: something does not work. `unknown`: could not be examined."""
    text: str
    """One sentence or list, for people."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same as values of JSON; sizes in bytes, rates in GB/s."""
    advice: tuple[str, ...] = ()
    """What to do, one sentence each."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "advice": list(self.advice)}


def guarded(subject: str, probe: Callable[[], Finding]) -> Finding:
    """What `probe` finds. An error of the probe becomes a finding: an examination never fails."""
    try:
        return probe()
    except Exception as error:
        return Finding(subject, "unknown", f"could not be examined ({type(error).__name__}: {error})")
