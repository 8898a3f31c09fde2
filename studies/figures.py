"""Tables and plots of studies: rows and lines of means with their spread, as `arms.mean_and_spread` makes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def table(rows: Mapping[str, Mapping[str, dict[str, Any] | None]]) -> str:
    """Markdown: a row for each arm, mean and standard deviation over seeds in each column."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, row in rows.items():
        cells = [f"{x['mean']:.3f} ± {x['spread']:.3f}" if (x := row.get(c)) else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(
    path: Path, lines: dict[str, list[dict[str, Any]]], panels: dict[str, str], ylabel: str = "nats per token"
) -> None:
    """A panel for each x axis: means with their spread, tokens and FLOPs on a logarithmic scale.

    Args:
        path: of the PNG.
        lines: label -> points with `mean`, `spread` and a value for each panel.
        panels: key of a point -> label of the axis.
        ylabel: of the vertical axis.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            x, y, e = ([point[k] for point in points] for k in (key, "mean", "spread"))
            axis.errorbar(x, y, yerr=e, marker="o", markersize=4, capsize=3, label=name)
        values = sorted({point[key] for points in lines.values() for point in points})
        smallest = next((value for value in values if value > 0), 1)
        axis.set_xscale("symlog", linthresh=smallest, linscale=0.5)
        ticks = _round_numbers(smallest / 2, values[-1] * 1.1) + [0] * (values[0] == 0)
        axis.set_xticks(ticks, [f"{x:g}" if x < 1e4 else f"{x / 1e3:g}k" if x < 1e6 else f"{x:.0e}" for x in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_xlabel(label)
    axes[0][0].set_ylabel(f"held-out loss, {ylabel}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, path)


def _round_numbers(least: float, most: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two numbers."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    return [x for power in powers for x in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if least <= x <= most]


def draw_bars(path: Path, rows: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """A line for each arm with a point for each of its numbers, means with their spread."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 1.2 + 0.32 * len(rows)), layout="constrained")
    for column in dict.fromkeys(name for row in rows.values() for name in row):
        points = [(x["mean"], name, x["spread"]) for name, row in rows.items() if (x := row.get(column))]
        means, names, spreads = zip(*points, strict=True)
        axis.errorbar(means, names, xerr=spreads, marker="o", markersize=5, capsize=3, linestyle="", label=column)
    axis.set_xlabel("held-out loss, nats per token")
    axis.grid(alpha=0.3)
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


def load_pyplot() -> Any:
    """matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG and forget the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    load_pyplot().close(figure)
