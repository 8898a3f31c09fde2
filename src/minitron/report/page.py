"""`report.json` and `report.html` in a folder: one self-contained file, light and dark, for phones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ..files import write_text
from .facts import Report

PLOTS_MISSING = "There are no plots, since matplotlib is not installed: pip install 'minitron[plot]'"


def write_report(report: Report, folder: Path) -> Path:
    """Write both files, each under a temporary name first.

    Args:
        report: the facts.
        folder: made if it is not there.

    Returns:
        The page. Without matplotlib it has tables only, and says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    for path, text in ((folder / "report.json", report.to_json()), (page, render(report))):
        write_text(path, text)
    return page


def render(report: Report) -> str:
    """The page as text. Every string of the report is escaped: sample texts may hold anything."""
    environment = Environment(
        loader=PackageLoader("minitron", "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": _count, "bytes": _bytes, "flops": _flops, "seconds": _seconds, "rate": _rate}
    template = environment.get_template("report.html.jinja")
    plots, note = _plots(report)
    return template.render(
        report=report, plots=plots, note=note, quality=_quality_table(report), architectures=_architectures(report),
        headlines=report.headlines(), doubts=report.doubts(),
        first_tokens=any(row.first_token_seconds is not None for row in report.speed),
    ).lstrip()  # fmt: skip


def _plots(report: Report) -> tuple[dict[str, dict[str, str]], str | None]:
    """Each plot for a wide and for a narrow screen. A curve or a comparison of one point is no plot."""
    from . import plots

    wanted: dict[str, Any] = {}
    if report.models:
        wanted["architectures"] = (plots.architectures, report.models)
    if report.importance is not None:
        wanted["importance"] = (plots.importance, report.importance)
    if sum(len(row.losses) for row in report.candidates) > 1:
        wanted["candidates"] = (plots.candidates, report.candidates)
    curves = [curve for curve in report.curves if len(curve.loss) > 1]
    if curves:
        wanted["curves"] = (plots.curves, curves)
    try:
        return {
            name: {"wide": draw(facts, narrow=False), "narrow": draw(facts, narrow=True)}
            for name, (draw, facts) in wanted.items()
        }, None
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return {}, PLOTS_MISSING


def _architectures(report: Report) -> list[tuple[str, list[str]]]:
    """A row for each number of the shape, a cell for each model."""
    names = list(dict.fromkeys(name for model in report.models for name in model.shape))
    rows = [
        (name.removeprefix("num_").replace("_", " "), [_cell(m.shape.get(name)) for m in report.models])
        for name in names
    ]
    rows.append(("parameters", [_count(sum(model.parts.values())) for model in report.models]))
    rows.append(("without embeddings", [_count(model.non_embedding) for model in report.models]))
    rows.append(("file", [_bytes(model.file_bytes) for model in report.models]))
    return rows


def _cell(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _quality_table(report: Report) -> list[dict[str, Any]]:
    """A row for each text and measure, a cell for each model."""
    models = [model.name for model in report.models]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for fact in report.quality:
        row = rows.setdefault((fact.text, fact.measure), {"text": fact.text, "measure": fact.measure, "cells": {}})
        error = "" if fact.error is None else f" ± {fact.error:.3f}"
        row["cells"][fact.model] = f"{fact.value:.4f}{error}"
    for row in rows.values():
        row["cells"] = [row["cells"].get(name, "") for name in models]
    return list(rows.values())


def _count(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.2f}{unit}"
    return f"{value:.0f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def _flops(value: float) -> str:
    return f"{value:.2e}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
