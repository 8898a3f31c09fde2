"""The plot of the SmolLM2 study: quality, speed and bytes in one panel, curves against tokens in the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import load_pyplot, save_figure
from smollm2_children import PARENT, SIZES, WAYS
from smollm2_facts import MISSING, is_known, longest
from smollm2_inputs import TASKS


def draw(found: dict[str, Any], path: Path) -> None:
    """Quality, speed and bytes in one panel; bits per byte and accuracy against tokens in the others."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(12.5, 9.5), layout="constrained")
    _draw_speed(axes[0][0], found)
    _draw_curves(axes[0][1], found, "75%")
    _draw_curves(axes[1][1], found, "50%")
    _draw_accuracy(axes[1][0], found)
    save_figure(figure, path)


LOST = "bits per byte lost, percent, mean of the held-out texts"


def _lost(model: dict[str, Any]) -> float | None:
    """Percent of bits per byte lost against the parent on the same pieces: models have different numbers of them."""
    lost = model["against"]["text"] if model["way"] != PARENT else dict.fromkeys(model["text"], 0.0)
    return 100 * sum(lost.values()) / len(lost) if lost and set(lost) == set(model["text"]) else None


def _draw_speed(axis: Any, found: dict[str, Any]) -> None:
    axis.set_title("quality, speed and bytes (area of a disc)")
    axis.set_xlabel("tokens per second, one text")
    axis.set_ylabel(LOST)
    drawn = False
    for number, (name, title) in enumerate((("parent", "parent"), ("ours-75%-0", "75%"), ("ours-50%-0", "50%"))):
        size = name.split("-")[1] if number else ""
        model = found["parent"] if not number else longest(found, "ours", size) or _cut(found, "ours", size)
        lost = _lost(model) if model else None
        speeds = found["speed"].get(name)
        if model is None or speeds is None or lost is None:
            continue
        for format, row in speeds["formats"].items():
            for who, filled in (("minitron", True), ("llama.cpp", False)):
                if who in row:
                    drawn = True
                    axis.scatter(
                        row[who], lost, s=row["bytes"] / 4e5, alpha=0.55 if filled else 1.0, edgecolors=f"C{number}",
                        facecolors=f"C{number}" if filled else "none",
                    )  # fmt: skip
            label = f"{format}\n{row['bytes'] / 1e6:.0f} MB"
            axis.annotate(label, (row["minitron"], lost), (0, -30), textcoords="offset points", ha="center", fontsize=7)
        state = "" if not number else f", {model['tokens']:,} tokens" if model["tokens"] else ", not trained"
        axis.scatter([], [], color=f"C{number}", label=title + state)
    if drawn:
        axis.scatter([], [], facecolors="none", edgecolors="black", label="llama.cpp, as many bits")
        axis.margins(0.15, 0.25)
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, MISSING, ha="center", transform=axis.transAxes)
    axis.grid(alpha=0.3)


def _cut(found: dict[str, Any], way: str, size: str) -> dict[str, Any] | None:
    return next(
        (m for m in found["models"] if m["way"] == way and m["size"] == size and not m["tokens"] and is_known(m)), None
    )


def _draw_curves(axis: Any, found: dict[str, Any], size: str) -> None:
    axis.set_title(f"{size} of the parameters without the embedding")
    axis.set_ylabel(LOST)
    for number, (way, title) in enumerate(WAYS.items()):
        known = [(m["tokens"], _lost(m)) for m in found["models"] if m["way"] == way and m["size"] == size]
        points = sorted((tokens, lost) for tokens, lost in known if lost is not None)
        if points:
            width = 2.5 if way == "ours" else 1.2
            axis.plot(
                *zip(*points, strict=True), marker="o", markersize=5, linewidth=width, label=title, color=f"C{number}"
            )
    axis.set_yscale("symlog", linthresh=10)
    axis.set_yticks([0, 5, 10, 20, 50, 100, 200, 400], ["0", "5", "10", "20", "50", "100", "200", "400"])
    _finish(axis, found)


def _draw_accuracy(axis: Any, found: dict[str, Any]) -> None:
    axis.set_title("tasks")
    axis.set_ylabel("accuracy against the parent, points, mean of tasks")
    for size in SIZES:
        for way, style in (("ours", "-"), ("depth", ":"), ("random", "--")):
            known = [(m["tokens"], _difference(m)) for m in found["models"] if m["way"] == way and m["size"] == size]
            points = sorted((tokens, score) for tokens, score in known if score is not None)
            if points:
                axis.plot(*zip(*points, strict=True), style, marker="o", markersize=5, label=f"{way}, {size}")
    _finish(axis, found)


def _difference(model: dict[str, Any]) -> float | None:
    gaps = model["against"]["tasks"]
    return 100 * sum(gap["difference"] for gap in gaps.values()) / len(TASKS) if set(gaps) == set(TASKS) else None


def _count(tokens: int) -> str:
    if tokens < 1000:
        return str(tokens)
    return f"{tokens / 1e3:.0f}k" if tokens < 1e6 else f"{tokens / 1e6:.1f}M"


def _finish(axis: Any, found: dict[str, Any]) -> None:
    """Tokens on a logarithmic scale with a 0, and the parent as a line."""
    first = found["settings"]["rounds"][0]["tokens"]
    axis.set_xscale("symlog", linthresh=first, linscale=0.5)
    last = max((m["tokens"] for m in found["models"] if is_known(m)), default=first) or first
    ticks = [0, *(r["tokens"] for r in found["settings"]["rounds"] if r["tokens"] <= last)]
    axis.set_xticks(ticks, [_count(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(-0.05 * first, last * 1.2)
    axis.set_xlabel("tokens of distillation")
    if axis.get_legend_handles_labels()[0]:
        axis.axhline(0.0, color="black", linewidth=1, label="parent")
        axis.legend(fontsize=7)
    else:
        axis.text(0.5, 0.5, MISSING, ha="center", transform=axis.transAxes)
    axis.grid(alpha=0.3)
