"""The roofline of decoding as a picture: tokens per second against bytes that a token reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_roofline(results: list[dict[str, Any]], target: Path) -> None:
    """Draw results of `measure.compare`, each with its `name`, and their peers.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: matplotlib does not write files with this ending.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bandwidth = max(result["read_bandwidth_gb_per_s"] for result in results)
    sizes = [size for result in results for size in (result["bytes_per_token"], result["dense_bytes_per_token"])]
    ends = [min(sizes) / 1.5, max(sizes) * 1.5]
    axes.loglog(ends, [bandwidth * 1e9 / size for size in ends], color="gray", label=f"{bandwidth:.0f} GB/s, measured")
    for result in results:
        (line,) = axes.plot(result["bytes_per_token"], result["tokens_per_s"], "o", label=f"{result['name']}, minitron")
        for marker, (peer, found) in zip("sv^", result["peers"].items(), strict=False):
            point = result["dense_bytes_per_token"], found["tokens_per_s"]
            axes.plot(*point, marker, color=line.get_color(), alpha=0.6, label=f"{result['name']}, {peer}")
    axes.set_xlabel("bytes of weights that a token reads")
    axes.set_ylabel("tokens/s")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small")
    figure.savefig(target, dpi=120)
