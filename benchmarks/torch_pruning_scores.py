"""Scores by torch-pruning's own criteria, on the units of this architecture.

torch-pruning finds what belongs together by tracing the model. On upstream's Nemotron (eager attention, 4 layers) that
did not end within ten minutes, so its criteria get the groups written out here: for a channel all matrices that read or
write it and all norms; for a neuron its row of `up_proj` and its column of `down_proj`; for a head its rows of `q_proj`
and columns of `o_proj`, averaged over the head as torch-pruning does.
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

from minitron import NemotronForCausalLM
from minitron.data.packing import Batch
from minitron.prune.scores import Scores

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


def _dependency(layer: torch.nn.Module, side: Any) -> Any:
    """What torch-pruning's criteria read of a dependency, under the names that each of them uses."""
    return SimpleNamespace(layer=layer, target=SimpleNamespace(module=layer), pruning_fn=side, handler=side)


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
    model = NemotronForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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
    config = model.config
    heads, groups, neurons, channel = [], [], [], [(model.model.norm, norm), (model.lm_head, columns)]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        by_row = importance(
            group(attention.q_proj.out_features, (attention.q_proj, rows), (attention.o_proj, columns))
        ).double()
        heads.append(by_row.view(config.num_attention_heads, -1).mean(1))
        groups.append(heads[-1].view(config.num_key_value_heads, -1).sum(1))
        neurons.append(importance(group(config.intermediate_size, (mlp.up_proj, rows), (mlp.down_proj, columns))))
        channel += [(x, columns) for x in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.up_proj)]
        channel += [(x, rows) for x in (attention.o_proj, mlp.down_proj)]
        channel += [(x, norm) for x in (layer.input_layernorm, layer.post_attention_layernorm)]
    return Scores(
        heads=heads,
        groups=groups,
        neurons=[x.double() for x in neurons],
        channels=importance(group(config.hidden_size, *channel)).double(),
        layers=torch.ones(config.num_hidden_layers, dtype=torch.float64),  # it does not remove layers
        about={"scores": f"torch-pruning {torch_pruning.__version__}, {criterion}"},
    )
