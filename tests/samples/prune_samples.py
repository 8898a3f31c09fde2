"""Random scores and plans, and the big model of which all that a plan cuts is silenced instead."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from minitron import NemotronConfig
from minitron.prune.architecture import Architecture
from minitron.prune.plan import LayerPlan, PrunePlan
from minitron.prune.scores import Scores


def random_scores(config: NemotronConfig, seed: int = 0, windows: tuple[int, ...] = ()) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    shape, layers = Architecture.of(config), config.num_hidden_layers

    def noise(size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    return Scores(
        heads=[noise(shape.heads) for _ in range(layers)],
        groups=[noise(shape.groups) for _ in range(layers)],
        neurons=[noise(shape.ffn) for _ in range(layers)],
        channels=noise(shape.hidden),
        layers=noise(layers),
        windows={length: noise(layers + 1 - length) for length in windows},
    )


def random_plan(
    config: NemotronConfig, target: Architecture, seed: int = 0, source: str = "", shuffle: bool = True
) -> PrunePlan:
    """Any plan of that size: every axis, the layers too, in random order if `shuffle`."""
    shape, draw = Architecture.of(config), random.Random(seed)

    def some(population: range, count: int) -> tuple[int, ...]:
        found = draw.sample(population, count)
        return tuple(found if shuffle else sorted(found))

    per_group, each = shape.heads // shape.groups, target.heads // target.groups
    layers = []
    for layer in some(range(shape.layers), target.layers):
        groups = some(range(shape.groups), target.groups)
        heads = [h for g in groups for h in some(range(g * per_group, (g + 1) * per_group), each)]
        layers.append(LayerPlan(layer, groups, tuple(heads), some(range(shape.ffn), target.ffn)))
    return PrunePlan(source, shape, some(range(shape.hidden), target.hidden), tuple(layers))


class MaskedNorm(nn.Module):
    """LayerNorm1P whose mean and variance are of the kept channels, written as the formula; 0 elsewhere."""

    def __init__(self, norm: Any, keep: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.keep = norm.weight, norm.bias, norm.eps, keep

    def forward(self, x: Tensor) -> Tensor:
        kept = x[..., self.keep]
        mean = kept.mean(-1, keepdim=True)
        variance = ((kept - mean) ** 2).mean(-1, keepdim=True)
        out = torch.zeros_like(x)
        normed = (kept - mean) / (variance + self.eps).sqrt()
        out[..., self.keep] = normed * (1 + self.weight[self.keep]) + self.bias[self.keep]
        return out


@torch.no_grad()
def silence(model: Any, plan: PrunePlan) -> Any:
    """Zero everything of upstream's big `model` that `plan` cuts; layers that go are skipped."""
    config = model.config
    body = getattr(model, "transformer", None) or getattr(model, "model", model)
    keep = torch.tensor(sorted(plan.channels))
    gone = torch.tensor(sorted(set(range(config.hidden_size)) - set(plan.channels)), dtype=torch.long)
    body.embed_tokens.weight[:, gone] = 0
    for number, entry in enumerate(plan.layers):
        layer = body.layers[entry.layer]
        layer.self_attn.layer_idx = number  # its place in the cache
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[gone] = 0
            if linear.bias is not None:
                linear.bias[gone] = 0
        heads = set(range(config.num_attention_heads)) - set(entry.heads)
        for head in heads:
            layer.self_attn.o_proj.weight[:, head * config.head_dim : (head + 1) * config.head_dim] = 0
        neurons = torch.tensor(sorted(set(range(config.intermediate_size)) - set(entry.neurons)), dtype=torch.long)
        layer.mlp.down_proj.weight[:, neurons] = 0
        layer.input_layernorm = MaskedNorm(layer.input_layernorm, keep)
        layer.post_attention_layernorm = MaskedNorm(layer.post_attention_layernorm, keep)
    body.norm = MaskedNorm(body.norm, keep)
    body.layers = nn.ModuleList([body.layers[entry.layer] for entry in plan.layers])
    body.config.num_hidden_layers = len(plan.layers)
    return model
