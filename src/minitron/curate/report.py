"""The evidence of a curation: what each stage and rule removed, with examples, as `report.json`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_text
from .recipe import Recipe
from .tally import StageTally

REPORT = "report.json"
"""Name of the file; when it is there, the curation is complete."""


@dataclass
class Report:
    """Facts of a curation."""

    stages: dict[str, StageTally] = field(default_factory=dict)
    """By name, in order; the first is `read`."""
    bad: int = 0
    """Documents that could not be read."""
    bad_named: list[str] = field(default_factory=list)
    empty: int = 0
    """Documents of nothing but white space."""
    recipe: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    seconds: float = 0.0
    workers: int = 1

    def add_bad(self, values: dict[str, Any]) -> None:
        """Add the bad documents of a part."""
        self.bad += values["count"]
        self.empty += values["empty"]
        self.bad_named += values["named"][: 20 - len(self.bad_named)]

    def finish(self, recipe: Recipe, inputs: list[str], seconds: float, workers: int) -> None:
        """Add what is known in the end."""
        self.recipe, self.inputs, self.seconds, self.workers = recipe.as_dict(), inputs, seconds, workers

    @property
    def documents_out(self) -> int:
        """Documents in the shards."""
        return list(self.stages.values())[-1].documents_out if self.stages else 0

    def reasons(self, most: int = 5) -> str:
        """The rules that removed most, as in "gopher_quality: few words (12)"."""
        removed = Counter({f"{s}: {rule}": n for s, tally in self.stages.items() for rule, n in tally.removed.items()})
        return ", ".join(f"{name} ({count:,})" for name, count in removed.most_common(most))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        stages = {}
        for name, tally in self.stages.items():
            speed = tally.bytes_in / 1e6 / tally.cpu_seconds if tally.cpu_seconds else None
            stages[name] = {**tally.as_dict(), "megabytes_per_cpu_second": speed}
        return {
            "stages": stages,
            "bad": {"count": self.bad, "named": self.bad_named},
            "empty": self.empty,
            "seconds": self.seconds,
            "workers": self.workers,
            "inputs": self.inputs,
            "recipe": self.recipe,
        }


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`."""
    write_text(folder / REPORT, json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")


def read_report(folder: Path) -> Report:
    """The report of a complete curation."""
    values = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    stages = {}
    for name, stage in values["stages"].items():
        del stage["megabytes_per_cpu_second"]
        stages[name] = StageTally.from_dict(stage)
    bad = values.pop("bad")
    return Report(**{**values, "stages": stages, "bad": bad["count"], "bad_named": bad["named"]})


def table(report: dict[str, Any]) -> str:
    """The funnel as lines of text."""
    lines = [f"{'stage':<20}{'documents':>12}{'MB':>10}{'removed':>10}{'MB/s':>8}  most removed by"]
    for name, stage in report["stages"].items():
        speed = stage["megabytes_per_cpu_second"]
        removed = stage["documents_in"] - stage["documents_out"]
        why = ", ".join(f"{rule} {count:,}" for rule, count in list(stage["removed"].items())[:3])
        lines.append(
            f"{name:<20}{stage['documents_out']:>12,}{stage['bytes_out'] / 1e6:>10,.1f}{removed:>10,}"
            f"{f'{speed:,.0f}' if speed else '':>8}  {why}".rstrip()
        )
    return "\n".join(lines)
