"""Plots of a report as SVG text that takes the page's own text colour, so that light and dark both read well."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .facts import CandidateFacts, Curve, ImportanceFacts, ModelFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Middle tones, distinct to people who do not see red and green, and legible on white and on near-black.
COLORS = ("#3f8fd6", "#d98324", "#2fa37c", "#c2578f", "#8f7bd1", "#9a8b3c")
# Stands for "the colour of the page's text" until the SVG is text; no plot uses it otherwise.
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: sharp, selectable, and in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "grid.color": _INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


WIDE, NARROW = 7.5, 3.75
"""Inches of a plot for a page and for a phone, where the labels are then as large as the text."""


def draw(size: tuple[float, float], paint: Callable[[Figure], None]) -> str:
    """What `paint` draws on a figure of `size` inches, as an SVG element.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Names within the SVG depend on the size, since a page holds a plot in two of them.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"minitron {size}"}):
        figure = pyplot.figure(figsize=size, layout="constrained")
        try:
            paint(figure)
            sink = io.StringIO()
            figure.savefig(sink, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(figure)
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # The size goes to the style sheet, so that a plot shrinks with a phone's screen.
    return re.sub(
        r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"|(<svg[^>]*?) width="[^"]*"', r"\1\2\3", svg, count=1
    )


def architectures(models: Sequence[ModelFacts], *, narrow: bool = False) -> str:
    """Parameters of each model by part, as stacked bars."""
    parts = list(models[0].parts)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        left = [0.0] * len(models)
        for part, color in zip(parts, COLORS * 2, strict=False):
            widths = [model.parts.get(part, 0) / 1e6 for model in models]
            axes.barh(range(len(models)), widths, left=left, color=color, label=part, height=0.62)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(models)), [_short(model.name) for model in models])
        axes.invert_yaxis()
        axes.set_xlabel("million parameters")
        axes.grid(False, axis="y")
        figure.legend(loc="outside upper center", ncols=2 if narrow else min(len(parts), 3))

    return draw((NARROW if narrow else WIDE, (1.9 if narrow else 1.5) + 0.5 * len(models)), paint)


def importance(scores: ImportanceFacts, *, narrow: bool = False) -> str:
    """Heat maps of neurons and heads by layer, and curves of channels and layers."""

    def heat(figure: Figure, axes: Axes, rows: list[list[float]], title: str, across: str) -> None:
        width = max(map(len, rows), default=1)
        table = [[*row, *[float("nan")] * (width - len(row))] for row in rows]
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.set(title=title, xlabel=across, ylabel="layer")
        axes.set_yticks(_every(len(rows)))
        axes.grid(False)
        figure.colorbar(image, ax=axes, fraction=0.05)

    def paint(figure: Figure) -> None:
        grid: Any = figure.subplots(*((4, 1) if narrow else (2, 2)))
        neurons, heads, channels, layers = grid.flatten()
        heat(figure, neurons, scores.neurons, "MLP neurons", "sorted by score")
        heat(figure, heads, scores.heads, "attention heads", "head")
        heads.set_xticks(_every(max(map(len, scores.heads), default=1)))
        channels.plot(scores.channels, color=COLORS[0])
        channels.set(title="embedding channels", xlabel="sorted by score", ylim=(0, None))
        layers.bar(range(len(scores.layers)), scores.layers, color=COLORS[2])
        layers.set(title="layers", xlabel="layer")
        layers.set_xticks(_every(len(scores.layers)))

    return draw((NARROW, 9.6) if narrow else (WIDE, 5.4), paint)


def candidates(found: Sequence[CandidateFacts], *, narrow: bool = False) -> str:
    """Size against held-out loss, before retraining (hollow) and after as much as each was given (filled)."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for row in found:
            stops = sorted(row.losses, key=int)
            if not stops:
                continue
            chosen = row.outcome == "chosen"
            color = COLORS[1] if chosen else COLORS[0]
            x = row.parameters / 1e6
            first, last = row.losses[stops[0]], row.losses[stops[-1]]
            axes.plot([x, x], [first, last], color=color, alpha=0.35, linewidth=1)
            axes.plot(x, first, "o", markerfacecolor="none", markeredgecolor=color, markersize=6)
            if len(stops) > 1:
                axes.plot(x, last, "*" if chosen else "o", color=color, markersize=13 if chosen else 6)
        handles: list[Any] = [
            axes.plot([], [], "o", markerfacecolor="none", markeredgecolor=COLORS[0], label="as pruned")[0],
            axes.plot([], [], "o", color=COLORS[0], label="after its retraining")[0],
            axes.plot([], [], "*", color=COLORS[1], markersize=13, label="chosen")[0],
        ]
        axes.set(xlabel="million parameters", ylabel="held-out loss, nats per token")
        figure.legend(handles=handles, loc="outside upper center", ncols=1 if narrow else 3)

    return draw((NARROW, 4.2) if narrow else (WIDE, 4.2), paint)


def curves(runs: Sequence[Curve], *, narrow: bool = False) -> str:
    """Held-out loss against tokens and against FLOPs, side by side; on a narrow screen one above the other."""

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2, sharey=True)
        for run, color in zip(runs, COLORS * len(runs), strict=False):
            label = _short(f"{run.stage}: {run.name}", 40)
            left.plot([n / 1e6 for n in run.tokens], run.loss, color=color, label=label, marker=".")
            right.plot(run.flops, run.loss, color=color, marker=".")
        left.set(xlabel="million tokens", ylabel="held-out loss, nats per token")
        right.set(xlabel="FLOPs, the teacher's included", **({"ylabel": "nats per token"} if narrow else {}))
        figure.legend(loc="outside upper center", ncols=1 if narrow else 2)

    rows = len(runs) if narrow else len(runs) // 2
    return draw((NARROW, 5.8 + 0.2 * rows) if narrow else (WIDE, 3.8 + 0.2 * rows), paint)


def _short(name: str, most: int = 16) -> str:
    """A name short enough for the plot; its end, by which names differ, is kept."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _every(count: int, most: int = 8) -> list[int]:
    """Positions of at most `most` ticks on `count` items."""
    return list(range(0, count, max(1, -(-count // most))))
