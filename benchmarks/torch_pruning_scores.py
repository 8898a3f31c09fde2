"""Scores by torch-pruning's own criteria, on the units of a decoder of any family in `minitron.families`.

torch-pruning finds what belongs together by tracing the model. On upstream's Nemotron (eager attention, 4 layers) that
did not end within ten minutes, so its criteria get the groups written out here: for a channel all matrices that read or
write it and all norms (torch-pruning skips norms that are not `nn.LayerNorm`); for a neuron its rows of `up_proj` and
of a gate and its column of `down_proj`; for a head its rows of `q_proj` and columns of `o_proj`, averaged over the head
as torch-pruning does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch_pruning
from torch_pruning.pruner import function

from minitron.data.packing import Batch
from minitron.families import family_of
from minitron.prune.scores import Scores
from minitron.train.inputs import saved_model

CRITERIA = ("magnitude", "taylor", "hessian")


@dataclass
class Item:
    """One entry of a torch-pruning group: a layer, which side of it, and the units."""

    dep: Any
    idxs: list[int]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))

    @property
    def root_idxs(self) -> list[int]:
        return self.idxs


def group(size: int, *members: tuple[torch.nn.Module, Any]) -> list[Item]:
    """A group of `size` units over (layer, pruning function) pairs."""
    return [
        Item(
            SimpleNamespace(layer=layer, target=SimpleNamespace(module=layer), pruning_fn=side, handler=side),
            list(range(size)),
        )
        for layer, side in members
    ]


def torch_pruning_scores(folder: Path, blocks: Batch, criterion: str) -> Scores:
    """Scores by `criterion`, one of CRITERIA, with gradients over `blocks` where it needs them."""
    model = saved_model(folder).eval()
    importance = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
        "taylor": torch_pruning.importance.GroupTaylorImportance,
        "hessian": torch_pruning.importance.GroupHessianImportance,
    }[criterion]()
    if criterion == "hessian":
        importance.zero_grad()
    for i in range(len(blocks.input_ids) if criterion != "magnitude" else 0):
        row = slice(i, i + 1)
        inputs = {"position_ids": blocks.position_ids[row], "labels": blocks.labels[row], "use_cache": False}
        if criterion == "hessian":
            model.zero_grad()
        model(blocks.input_ids[row], **inputs).loss.backward()
        if criterion == "hessian":
            importance.accumulate_grad(model)
    return _scores(model, importance, criterion)


def _scores(model: Any, importance: Any, criterion: str) -> Scores:
    rows, columns = function.prune_linear_out_channels, function.prune_linear_in_channels
    norm = function.prune_layernorm_out_channels
    config, family = model.config, family_of(model.config)
    heads, groups, neurons, channel = [], [], [], [(model.model.norm, norm), (model.lm_head, columns)]
    for layer in model.model.layers:
        part = {part.role: layer.get_submodule(part.name) for part in family.layer}
        inner = [part[role] for role in ("gate", "up") if family.has(role)]  # type: ignore[arg-type]
        query, output, down = part["query"], part["output"], part["down"]
        by_row = importance(group(query.out_features, (query, rows), (output, columns))).double()
        heads.append(by_row.view(config.num_attention_heads, -1).mean(1))
        groups.append(heads[-1].view(config.num_key_value_heads, -1).sum(1))
        neurons.append(importance(group(config.intermediate_size, *((x, rows) for x in inner), (down, columns))))
        channel += [(x, columns) for x in (query, part["key"], part["value"], *inner)]
        channel += [(x, rows) for x in (output, down)]
        channel += [(x, norm) for x in (part["attention_norm"], part["mlp_norm"])]
    return Scores(
        heads=heads,
        groups=groups,
        neurons=[x.double() for x in neurons],
        channels=importance(group(config.hidden_size, *channel)).double(),
        layers=torch.ones(config.num_hidden_layers, dtype=torch.float64),  # it does not remove layers
        about={"scores": f"torch-pruning {torch_pruning.__version__}, {criterion}"},
    )
