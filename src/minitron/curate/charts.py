"""Histograms as SVG text in the colours of the page, so that light and dark both read well."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 340, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 6, 6, 8, 24
_LABELS = 5
"""Edges that are written below the bars, at most."""


def histogram(name: str, edges: Sequence[float], counts: Sequence[int], after: Sequence[int] | None = None) -> str:
    """Bars of counts between edges; those of the documents that stay in front of them.

    Args:
        name: what was measured, for screen readers.
        edges: upper edges of all bins but the last one.
        counts: (edges + 1) documents.
        after: the same of the documents that stay.
    """
    used = [i for i, count in enumerate(counts) if count or (after and after[i])]
    first, last = used[0], used[-1]
    shown = range(first, last + 1)
    most = max(max(counts[i] for i in shown), max((after[i] for i in shown), default=0) if after else 0)
    step = (_WIDTH - _LEFT - _RIGHT) / len(shown)
    floor = _HEIGHT - _BOTTOM
    parts = []
    for position, i in enumerate(shown):
        x = _LEFT + position * step
        what = f"{_range(edges, i)}: {counts[i]:,}" + (f", {after[i]:,} in the shards" if after else "")
        parts.append(f"<g><title>{escape(what)}</title>")
        parts.append(_bar("before", x + 0.06 * step, 0.88 * step, counts[i] / most, floor))
        if after:
            parts.append(_bar("after", x + 0.06 * step, 0.88 * step, after[i] / most, floor))
        parts.append("</g>")
    every = max(1, -(-len(shown) // _LABELS))
    for position, i in enumerate(shown):
        if position % every == 0 and i < len(edges):
            x = _LEFT + (position + 1) * step
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 7}" text-anchor="middle">{_number(edges[i])}</text>')
    axis = f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}">{"".join(parts)}{axis}</svg>'


def _bar(kind: str, x: float, width: float, share: float, floor: float) -> str:
    height = share * (floor - _TOP)
    if share:
        height = max(height, 1.0)  # a few documents among many still show
    return f'<rect class="{kind}" x="{x:.1f}" y="{floor - height:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _range(edges: Sequence[float], i: int) -> str:
    if i == 0:
        return f"up to {_number(edges[0])}"
    return f"{_number(edges[i - 1])} to {_number(edges[i])}" if i < len(edges) else f"more than {_number(edges[-1])}"


def _number(value: float) -> str:
    for limit, unit in ((2.0**30, "G"), (2.0**20, "M"), (2.0**10, "k")):
        if value >= limit:
            return f"{value / limit:.0f}{unit}"
    return f"{value:g}"
