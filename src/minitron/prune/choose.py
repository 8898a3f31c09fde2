"""From scores and a shape to a plan: the best of each axis stay (arXiv:2407.14679, sections 2.2 and 2.3)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..config import ModelConfig
from .architecture import Architecture
from .plan import LayerPlan, PlanError, PrunePlan
from .scores import Scores


def make_plan(
    config: ModelConfig,
    scores: Scores,
    target: Architecture,
    *,
    source: str,
    depth: Literal["single", "contiguous"] = "single",
    order: Literal["original", "importance"] = "original",
    merge_heads: bool = False,
) -> PrunePlan:
    """Keep what scores highest: channels for the whole model, heads within each group, groups and neurons per layer.

    Args:
        config: of the source.
        scores: of the source, on every axis that `target` cuts.
        target: the shape to reach.
        source: fingerprint of the checkpoint.
        depth: "single": the layers that score highest one by one; "contiguous": all but the neighbouring layers whose
            removal together hurts least (arXiv:2408.11796), which needs `scores.windows` of that length.
        order: "original": indices stay in the order of the source; "importance": the most important first, so that
            every smaller width is a prefix. The function that the model computes does not depend on it.
        merge_heads: take the query weights of heads that go into those that stay (section 2.3); needs at least half
            of the heads of a group to stay.

    Ties are decided for the lower index.

    Raises:
        ArchitectureError: `target` is not a part of the source.
        ScoresError: scores of a model of another shape.
        PlanError: no scores of windows of the length that goes; too few heads to merge.
    """
    shape = Architecture.of(config)
    target.check_for(config)
    scores.check_fits(config)
    if merge_heads and 2 * (target.heads // target.groups) < shape.heads // shape.groups:
        raise PlanError(
            f"merging heads needs at least half of each group to stay; heads={target.heads} keeps "
            f"{target.heads // target.groups} of {shape.heads // shape.groups}"
        )
    channels = _best(scores.channels, target.hidden, order)
    layers = tuple(
        _layer_plan(scores, layer, shape, target, order, merge_heads) for layer in _kept_layers(scores, target, depth)
    )
    return PrunePlan(source, shape, channels, layers, scores_hash(scores))


def sorted_plan(config: ModelConfig, scores: Scores, *, source: str) -> PrunePlan:
    """Keep everything, with the most important channels, groups, heads of a group and neurons first.

    Of the checkpoint that this makes, `prefix_plan` cuts every smaller width: one file, all sizes.
    """
    return make_plan(config, scores, Architecture.of(config), source=source, order="importance")


def scores_hash(scores: Scores) -> str:
    """SHA-256 of the numbers, in hex; where they came from does not count."""
    digest = hashlib.sha256()
    for name in ("heads", "groups", "neurons"):
        for vector in getattr(scores, name):
            digest.update(vector.numpy().tobytes())
    for vector in (scores.channels, scores.layers, *(scores.windows[length] for length in sorted(scores.windows))):
        digest.update(vector.numpy().tobytes())
    return digest.hexdigest()


def _kept_layers(scores: Scores, target: Architecture, depth: str) -> tuple[int, ...]:
    count = scores.num_layers
    length = count - target.layers
    if length < 2 or depth == "single":
        return _best(scores.layers, target.layers, "original")
    if length not in scores.windows:
        known = ", ".join(map(str, scores.windows)) or "none"
        raise PlanError(f"no scores of {length} neighbouring layers; there are some of these lengths: {known}")
    first = int(scores.windows[length].argmin())
    return tuple(layer for layer in range(count) if not first <= layer < first + length)


def _layer_plan(
    scores: Scores, layer: int, shape: Architecture, target: Architecture, order: str, merge_heads: bool
) -> LayerPlan:
    per_group, keep = shape.heads // shape.groups, target.heads // target.groups
    groups = _best(scores.groups[layer], target.groups, order)
    heads: list[int] = []
    merge: list[tuple[int, int]] = []
    for group in groups:
        first = group * per_group
        ranked = [first + head for head in ranking(scores.heads[layer][first : first + per_group])]
        kept = ranked[:keep]
        heads += kept if order == "importance" else sorted(kept)
        if merge_heads:
            # The last that stays with the first that goes, and so on outwards.
            merge += zip(reversed(kept), ranked[keep:], strict=False)
    neurons = _best(scores.neurons[layer], target.ffn, order)
    return LayerPlan(layer, groups, tuple(heads), neurons, tuple(merge))


def ranking(scores: Tensor) -> list[int]:
    """Indices from the highest score to the lowest; equal scores by index."""
    return torch.sort(scores, descending=True, stable=True).indices.tolist()


def _best(scores: Tensor, count: int, order: str) -> tuple[int, ...]:
    best: Sequence[int] = ranking(scores)[:count]
    return tuple(best if order == "importance" else sorted(best))
