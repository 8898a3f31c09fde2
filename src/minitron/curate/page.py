"""The report of a curation as `report.html`: one self-contained file, light and dark, for phones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import write_text
from .charts import histogram
from .report import Report

PAGE = "report.html"
STAGE_NAMES = {
    "read": "read",
    "normalize": "normalization",
    "boilerplate": "boilerplate",
    "personal_data": "personal data",
    "language": "language",
    "gopher_repetition": "Gopher, repetition",
    "gopher_quality": "Gopher, quality",
    "c4": "C4",
    "fineweb": "FineWeb",
    "code": "code",
    "decontaminate": "decontamination",
    "quality_score": "quality score",
    "tokens": "tokens",
    "exact_pieces": "repeated paragraphs and lines",
    "exact": "exact duplicates",
    "near": "near duplicates",
    "semantic": "semantic duplicates",
    "mix": "mixing",
}


def write_page(report: Report, path: Path) -> None:
    """Write the page under a temporary name first."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page as text. Every string of the report is escaped: texts may hold anything."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("minitron", "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": _size, "seconds": _seconds, "share": _share, "number": "{:,}".format}
    environment.filters["stage"] = lambda name: STAGE_NAMES.get(name, name)
    facts = report.as_dict()
    stages = list(facts["stages"].values())
    first, last = (stages[0], stages[-1]) if stages else ({}, {})
    return environment.get_template("curation.html.jinja").render(
        facts=facts, first=first, last=last, most=max((s["documents_in"] for s in stages), default=0),
        cpu=sum(s["cpu_seconds"] for s in stages), charts=_charts(facts), languages=_languages(facts["languages"]),
        tokens=any(s["tokens_in"] for s in stages), settings=_settings(facts["recipe"]),
        slowest=max((s["cpu_seconds"] for s in stages), default=0.0),
    ).lstrip()  # fmt: skip


def _charts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, SVG) of each distribution; those of all documents with the ones that stay."""
    made = []
    for name, counts in facts["distributions"].items():
        if sum(counts):
            made.append((name, histogram(name, facts["edges"][name], counts, facts["after"].get(name))))
    return made


def _languages(languages: dict[str, dict[str, int]], most: int = 20) -> list[tuple[str, int, int]]:
    """(code, documents before, documents after), the most frequent first."""
    before, after = languages["before"], languages["after"]
    codes = sorted(before, key=lambda code: (-before[code], code))
    rows = [(code, before[code], after.get(code, 0)) for code in codes[:most]]
    rest = codes[most:]
    if rest:
        rows.append(
            (f"{len(rest)} others", sum(before[code] for code in rest), sum(after.get(code, 0) for code in rest))
        )
    return rows


def _settings(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """The parts of a recipe that are used, each with its values."""
    rows = []
    for name, value in recipe.items():
        if isinstance(value, dict):
            rows.append((name, ", ".join(f"{key}: {_plain(each)}" for key, each in value.items())))
        elif value is not None:
            rows.append((name, _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(each)}" for key, each in value.items()) + "}"
    return {"True": "true", "False": "false", "None": "none"}.get(str(value), str(value))


def _size(value: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:,.1f} {unit}"
    return f"{value:.0f} B"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s" if value >= 0.05 else f"{1000 * value:.0f} ms"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _share(part: float, whole: float) -> str:
    """As a percentage; rare things are not shown as none."""
    if not whole:
        return ""
    percent = 100 * part / whole
    return f"{percent:.1f}%" if percent >= 0.1 or not part else "<0.1%"
