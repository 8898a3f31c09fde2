"""Scores to compare importance with: random, weight magnitude, and the first-order Taylor expansion of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.hf import check_checkpoint, read_config
from ..config import ModelConfig
from ..data.packing import Batch
from ..families import family_of
from ..family_models import causal_lm_class
from ..shapes import describe
from .scores import Scores
from .streaming import StreamedModel, batch_digest


def random_scores(config: ModelConfig, seed: int) -> Scores:
    """Uniform random numbers on every axis."""
    generator = torch.Generator().manual_seed(seed)
    layers: int = config.num_hidden_layers

    def vector(size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    return Scores(
        heads=[vector(config.num_attention_heads) for _ in range(layers)],
        groups=[vector(config.num_key_value_heads) for _ in range(layers)],  # type: ignore[arg-type]
        neurons=[vector(config.intermediate_size) for _ in range(layers)],
        channels=vector(config.hidden_size),
        layers=vector(layers),
        about={"scores": "random", "seed": seed},
    )


def magnitude_scores(folder: str | Path) -> Scores:
    """L2 norm of all weights of a unit; no calibration. One layer in memory at a time.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    model = StreamedModel(Path(folder))
    shape = model.shape
    matrices = [part for part in shape.family.layer if part.columns is not None]
    heads, groups, neurons, layers = [], [], [], []
    channels = _squares_of_columns(model.tensor("embed_tokens.weight").blocks())
    if model.has_head and not shape.tied:
        channels += _squares_of_columns(model.head().blocks())
    for index in range(shape.layers):
        square = {
            part: model.tensor(f"layers.{index}.{part.name}.weight").load().double().square() for part in matrices
        }
        along = dict.fromkeys(("queries", "keys", "neurons"), torch.zeros((), dtype=torch.float64))
        for part, values in square.items():
            for axis, sums in ((part.rows, values.sum(1)), (part.columns, values.sum(0))):
                if axis == "channels":
                    channels += sums
                else:
                    along[axis] = along[axis] + sums  # type: ignore[index]
        head = along["queries"].view(-1, shape.head_dim).sum(1)
        group = along["keys"].view(-1, shape.head_dim).sum(1)
        heads.append(head.sqrt())
        groups.append((group + head.view(len(group), -1).sum(1)).sqrt())
        neurons.append(along["neurons"].sqrt())
        layers.append(sum(float(x.sum()) for x in square.values()) ** 0.5)
    about = {"scores": "magnitude", "checkpoint": fingerprint(Path(folder))}
    return Scores(heads, groups, neurons, channels.sqrt(), torch.tensor(layers, dtype=torch.float64), about=about)


def _squares_of_columns(blocks: Iterator[Tensor]) -> Tensor:
    return sum((block.double().square().sum(0) for block in blocks), start=torch.zeros((), dtype=torch.float64))


def taylor_scores(folder: str | Path, blocks: Batch) -> Scores:
    """|d loss / d gate|, averaged over samples, of a factor of 1 on each unit: the first-order change of the loss.

    A head's factor is on its output, a neuron's on its activation, a channel's (one for all) on the output of every
    norm, a layer's on what it adds to the residual stream (Molchanov et al. 2019, arXiv 1906.10771). Needs the
    whole model with its gradients in memory, in fp32; a baseline, not part of the recipe.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    kind = causal_lm_class(family_of(read_config(folder)))
    model: Any = kind.from_pretrained(folder, dtype=torch.float32)
    model.eval().requires_grad_(False)
    config, total = model.config, model.config.num_hidden_layers
    sums: dict[str, Tensor] = {}
    for i in range(len(blocks.input_ids)):
        with _gates(model) as gates:
            row = slice(i, i + 1)
            loss = model(
                blocks.input_ids[row],
                position_ids=blocks.position_ids[row],
                labels=blocks.labels[row],
                use_cache=False,
            ).loss
            found = torch.autograd.grad(loss, list(gates.values()))
        for name, grad in zip(gates, found, strict=True):
            grad = grad.double()
            if name.startswith("heads"):  # a group goes with all of its heads
                per_group = grad.view(config.num_key_value_heads, -1).sum(1).abs()
                sums[name.replace("heads", "groups")] = sums.get(name.replace("heads", "groups"), 0) + per_group
            sums[name] = sums.get(name, 0) + grad.abs()
    mean = {name: value / len(blocks.input_ids) for name, value in sums.items()}
    return Scores(
        heads=[mean[f"heads.{i}"] for i in range(total)],
        groups=[mean[f"groups.{i}"] for i in range(total)],
        neurons=[mean[f"neurons.{i}"] for i in range(total)],
        channels=mean["channels"],
        layers=mean["layers"],
        about={"scores": "taylor", "checkpoint": fingerprint(folder), "calibration": batch_digest(blocks)},
    )


@contextmanager
def _gates(model: Any) -> Iterator[dict[str, Tensor]]:
    """Factors of 1 that require gradients, applied to the units by hooks."""
    shape = describe(model.config)
    layers = torch.ones(shape.layers, requires_grad=True)
    channels = torch.ones(shape.hidden, requires_grad=True)
    gates, hooks = {"channels": channels, "layers": layers}, []

    def times(gate: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, out: out * gate

    hooks.append(model.model.norm.register_forward_hook(times(channels)))
    for i, layer in enumerate(model.model.layers):
        gates[f"heads.{i}"] = heads = torch.ones(shape.heads, requires_grad=True)
        gates[f"neurons.{i}"] = neurons = torch.ones(shape.ffn, requires_grad=True)
        part = {part.role: layer.get_submodule(part.name) for part in shape.family.layer}
        hooks += [
            part["attention_norm"].register_forward_hook(times(channels)),
            part["mlp_norm"].register_forward_hook(times(channels)),
            part["output"].register_forward_pre_hook(
                lambda m, args, gate=heads: (args[0] * gate.repeat_interleave(shape.head_dim),)
            ),
            part["down"].register_forward_pre_hook(lambda m, args, gate=neurons: (args[0] * gate,)),
            part["output"].register_forward_hook(times(layers[i])),
            layer.mlp.register_forward_hook(times(layers[i])),
        ]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()
