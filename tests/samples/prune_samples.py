"""Random scores and plans, and the big model of which all that a plan cuts is silenced instead."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from minitron.config import ModelConfig
from minitron.prune.architecture import Architecture
from minitron.prune.plan import LayerPlan, PrunePlan
from minitron.prune.scores import Scores
from minitron.shapes import Shape, describe


def random_scores(config: ModelConfig, seed: int = 0, windows: tuple[int, ...] = ()) -> Scores:
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
    config: ModelConfig, target: Architecture, seed: int = 0, source: str = "", shuffle: bool = True
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
    """The norm of a family in the dtype of its input, written as the formula, over the kept channels; 0 elsewhere."""

    def __init__(self, norm: Any, keep: Tensor, shape: Shape) -> None:
        super().__init__()
        self.weight, self.bias, self.keep, self.eps = norm.weight, getattr(norm, "bias", None), keep, shape.norm_eps
        self.kind = shape.family.norm

    def forward(self, x: Tensor) -> Tensor:
        kept = x[..., self.keep]
        if self.kind.kind == "layernorm1p":
            kept = kept - kept.mean(-1, keepdim=True)
        normed = kept / ((kept**2).mean(-1, keepdim=True) + self.eps).sqrt()
        out = torch.zeros_like(x)
        out[..., self.keep] = normed * (self.kind.offset + self.weight[self.keep])
        if self.bias is not None:
            out[..., self.keep] += self.bias[self.keep]
        return out


class ExactHeadNorm(nn.Module):
    """A norm of heads in the dtype of its input."""

    def __init__(self, norm: Any, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / ((x**2).mean(-1, keepdim=True) + self.eps).sqrt()


def with_exact_norms(model: Any, keep: Tensor | None = None) -> Any:
    """`model` with norms that compute in its dtype, which upstream's RMS norms do not in float64.

    Args:
        model: a model of any family; changed in place.
        keep: channels that the norms of the residual stream see; all if None.
    """
    shape = describe(model.config)
    body = getattr(model, "transformer", None) or getattr(model, "model", model)
    kept = torch.arange(shape.hidden) if keep is None else keep
    for layer in body.layers:
        layer.input_layernorm = MaskedNorm(layer.input_layernorm, kept, shape)
        layer.post_attention_layernorm = MaskedNorm(layer.post_attention_layernorm, kept, shape)
        if shape.family.has("query_norm"):
            layer.self_attn.q_norm = ExactHeadNorm(layer.self_attn.q_norm, shape.norm_eps)
            layer.self_attn.k_norm = ExactHeadNorm(layer.self_attn.k_norm, shape.norm_eps)
    body.norm = MaskedNorm(body.norm, kept, shape)
    return model


@torch.no_grad()
def silence(model: Any, plan: PrunePlan) -> Any:
    """Zero everything of upstream's big `model` that `plan` cuts; layers that go are skipped."""
    config, head_dim = model.config, describe(model.config).head_dim
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
            layer.self_attn.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
        neurons = torch.tensor(sorted(set(range(config.intermediate_size)) - set(entry.neurons)), dtype=torch.long)
        layer.mlp.down_proj.weight[:, neurons] = 0
    with_exact_norms(model, keep)
    body.layers = nn.ModuleList([body.layers[entry.layer] for entry in plan.layers])
    body.config.num_hidden_layers = len(plan.layers)
    if getattr(body.config, "layer_types", None) is not None:
        body.config.layer_types = body.config.layer_types[: len(plan.layers)]
    return model
