"""Pictures of importance scores: one heat map per axis, a row a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .scores import Scores

_MOST_COLUMNS = 512
"""Of a heat map; more units than that are shown as means of neighbours in order of their scores."""


def plot_scores(scores: Scores, path: str | Path) -> None:
    """Write a picture (the suffix decides the format) with heat maps of heads, groups and neurons, and the channels.

    Each row of a heat map is a layer, divided by its largest score. Heads and groups are in their own order, neurons
    and channels from the highest score to the lowest, so that the picture shows how fast importance falls.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # no backend and no display are needed for files
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'minitron[plot]'") from None
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    _heat_map(figure, axes[0], scores.heads, "heads", "head")
    _heat_map(figure, axes[1], scores.groups, "key/value groups", "group")
    falling = [vector.sort(descending=True).values for vector in scores.neurons]
    _heat_map(figure, axes[2], [_shorten(x) for x in falling], "neurons", "share of neurons, best first", share=True)
    channels = scores.channels.sort(descending=True).values
    axes[3].plot(torch.linspace(0, 1, len(channels)).tolist(), (channels / channels.max()).tolist())
    axes[3].set(title="channels", xlabel="share of channels, best first", ylabel="score / highest", ylim=(0, None))
    axes[4].bar(range(scores.num_layers), scores.layers.tolist())
    axes[4].set(title=f"layers, by {scores.about.get('depth', 'their score')}", xlabel="layer")
    for length, values in scores.windows.items():
        axes[5].plot(range(len(values)), values.tolist(), marker=".", label=f"{length} layers")
    axes[5].set(title="contiguous layers", xlabel="first layer")
    if scores.windows:
        axes[5].legend()
    else:
        axes[5].set_axis_off()
    aggregation = scores.about.get("aggregation")
    figure.suptitle(f"importance, aggregated by {tuple(aggregation)} over (batch, sequence)" if aggregation else "")
    figure.savefig(Path(path))


def _heat_map(figure: Any, axis: Any, rows: list[Tensor], title: str, what: str, share: bool = False) -> None:
    image = torch.stack([row / row.max().clamp(min=torch.finfo(row.dtype).tiny) for row in rows])
    extent = (0, 1, len(rows) - 0.5, -0.5) if share else None
    drawn = axis.imshow(image.numpy(), aspect="auto", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    axis.set(title=title, xlabel=what, ylabel="layer")
    figure.colorbar(drawn, ax=axis, label="score / highest of the layer")


def _shorten(values: Tensor) -> Tensor:
    if len(values) <= _MOST_COLUMNS:
        return values
    return torch.stack([part.mean() for part in values.tensor_split(_MOST_COLUMNS)])
