"""The evidence of a curation: what each stage and rule removed, with examples, as `report.json`."""

from __future__ import annotations

import json
import resource
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from .distributions import EDGES, Distributions
from .recipe import Recipe
from .tally import StageTally

REPORT = "report.json"
"""Name of the file; when it is there, the curation is complete."""
MOST_SOURCES = 200
"""Files that the report lists, the largest ones; the others are added up."""
_OTHERS = "other files"


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
    languages: dict[str, dict[str, int]] = field(default_factory=lambda: {"before": {}, "after": {}})
    """Documents by language, of those that reached the language stage and of those in the shards."""
    sources: dict[str, list[int]] = field(default_factory=dict)
    """File: documents and bytes before, documents and bytes after."""
    distributions: Distributions = field(default_factory=Distributions)
    """Of the documents that reached the stage that measured them; bytes and tokens of all."""
    after: Distributions = field(default_factory=Distributions)
    """Of the documents in the shards."""
    clusters: dict[str, Any] = field(default_factory=dict)
    """Of `near` and `semantic`: how many, of which sizes, and the largest."""
    startup_seconds: float = 0.0
    """CPU-seconds in which workers compiled or loaded kernels and models; not part of any stage's."""
    recipe: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    seconds: float = 0.0
    workers: int = 1
    estimate: dict[str, Any] = field(default_factory=dict)
    """What was expected beforehand."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Largest resident memory of the first process and of the largest worker."""

    def add_part(self, record: dict[str, Any]) -> None:
        """Add what was recorded of a part."""
        bad = record["bad"]
        self.bad += bad["count"]
        self.empty += bad["empty"]
        self.bad_named += bad["named"][: 20 - len(self.bad_named)]
        for name, values in record["stages"].items():
            self.stages.setdefault(name, StageTally()).merge(StageTally.from_dict(values))
        self.languages["before"] = dict(Counter(self.languages["before"]) + Counter(record["languages"]))
        self.distributions.merge(Distributions.from_dict(record["distributions"]))
        self.startup_seconds += record["startup_seconds"]
        for source, (documents, size) in record["sources"].items():
            found = self.sources.setdefault(source, [0, 0, 0, 0])
            found[0] += documents
            found[1] += size

    def add_after(self, every: Any, copies: Any, recipe: Recipe) -> None:
        """Add what is in the shards.

        Args:
            every: an `across.AllParts`.
            copies: (documents,) how often each is written.
        """
        self.after.add("bytes", np.repeat(every.sizes, copies))
        if recipe.tokens is not None:
            self.after.add("tokens", np.repeat(every.tokens, copies))
        for source, copy, size in zip(every.column("source"), copies.tolist(), every.sizes.tolist(), strict=True):
            found = self.sources[source]
            found[2] += copy
            found[3] += copy * size
        if recipe.language is not None:
            counted: Counter[str] = Counter()
            for code, copy in zip(every.column("language"), copies.tolist(), strict=True):
                counted[code] += copy
            self.languages["after"] = dict(+counted)

    def finish(self, recipe: Recipe, inputs: list[str], seconds: float, workers: int, estimate: dict[str, Any]) -> None:
        """Add what is known in the end."""
        self.recipe, self.inputs, self.seconds, self.workers = recipe.as_dict(), inputs, seconds, workers
        self.estimate = estimate
        self.peak_bytes = {
            "first process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "largest worker": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        }
        named = sorted(self.sources.items(), key=lambda item: (-item[1][1], item[0]))
        self.sources = dict(named[:MOST_SOURCES])
        if len(named) > MOST_SOURCES:
            self.sources[_OTHERS] = [sum(values) for values in zip(*(v for _, v in named[MOST_SOURCES:]), strict=True)]

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
            "languages": self.languages,
            "sources": self.sources,
            "distributions": self.distributions.as_dict(),
            "after": self.after.as_dict(),
            "edges": {name: EDGES[name] for name in self.distributions.counts},
            "clusters": self.clusters,
            "startup_seconds": self.startup_seconds,
            "seconds": self.seconds,
            "workers": self.workers,
            "estimate": self.estimate,
            "peak_bytes": self.peak_bytes,
            "inputs": self.inputs,
            "recipe": self.recipe,
        }


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`."""
    write_text(folder / REPORT, json.dumps(report.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_report(folder: Path) -> Report:
    """The report of a complete curation."""
    values = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    stages = {}
    for name, stage in values["stages"].items():
        del stage["megabytes_per_cpu_second"]
        stages[name] = StageTally.from_dict(stage)
    bad = values.pop("bad")
    del values["edges"]
    found = {name: Distributions.from_dict(values[name]) for name in ("distributions", "after")}
    return Report(**{**values, **found, "stages": stages, "bad": bad["count"], "bad_named": bad["named"]})


def table(report: dict[str, Any]) -> str:
    """The funnel as lines of text."""
    tokens = any(stage["tokens_in"] for stage in report["stages"].values())
    head = f"{'tokens':>14}" if tokens else ""
    lines = [f"{'stage':<20}{'documents':>12}{'MB':>10}{head}{'removed':>10}{'MB/s':>8}  most removed by"]
    for name, stage in report["stages"].items():
        speed = stage["megabytes_per_cpu_second"]
        removed = sum(stage["removed"].values())
        why = ", ".join(f"{rule} {count:,}" for rule, count in list(stage["removed"].items())[:3])
        count = f"{stage['tokens_out']:>14,}" if tokens else ""
        lines.append(
            f"{name:<20}{stage['documents_out']:>12,}{stage['bytes_out'] / 1e6:>10,.1f}{count}{removed:>10,}"
            f"{f'{speed:,.0f}' if speed else '':>8}  {why}".rstrip()
        )
    return "\n".join(lines)
