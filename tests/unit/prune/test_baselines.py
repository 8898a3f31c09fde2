"""Baseline scores against sums over weights by hand and against finite differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibration import batch, saved

from minitron.data.packing import Batch
from minitron.prune.baselines import magnitude_scores, random_scores, taylor_scores


def test_random_scores_follow_the_seed(tmp_path: Path) -> None:
    model = saved(tmp_path)
    one, same, other = (random_scores(model.config, seed) for seed in (1, 1, 2))
    one.check_fits(model.config)
    assert torch.equal(one.channels, same.channels)
    assert not torch.equal(one.channels, other.channels)


@pytest.mark.parametrize("tied", [False, True])
def test_magnitude_is_the_norm_of_what_would_be_cut(tmp_path: Path, tied: bool) -> None:
    model = saved(tmp_path, tie_word_embeddings=tied)
    scores = magnitude_scores(tmp_path)
    weights = {name: x for name, x in model.state_dict().items() if x.dim() == 2 and not (tied and "lm_head" in name)}
    layer = {name.removeprefix("model.layers.1."): x for name, x in weights.items() if ".layers.1." in name}
    q, k, v, o = (layer[f"self_attn.{p}_proj.weight"] for p in "qkvo")
    head = torch.cat([q[8:16].flatten(), o[:, 8:16].flatten()])
    group = torch.cat([q[16:32].flatten(), o[:, 16:32].flatten(), k[8:16].flatten(), v[8:16].flatten()])
    neuron = torch.cat([layer["mlp.up_proj.weight"][5], layer["mlp.down_proj.weight"][:, 5]])
    assert scores.heads[1][1].item() == pytest.approx(head.norm().item())
    assert scores.groups[1][1].item() == pytest.approx(group.norm().item())
    assert scores.neurons[1][5].item() == pytest.approx(neuron.norm().item())
    assert scores.layers[1].item() == pytest.approx(sum(x.square().sum() for x in layer.values()).item() ** 0.5)
    outputs = ("o_proj.weight", "down_proj.weight")
    channel = [x[9] if name.endswith(outputs) else x[:, 9] for name, x in weights.items()]
    assert scores.channels[9].item() == pytest.approx(torch.cat(channel).norm().item())


def test_taylor_is_the_slope_of_the_loss(tmp_path: Path) -> None:
    model = saved(tmp_path)
    blocks = batch()
    one = Batch(*(x[:1] for x in (blocks.input_ids, blocks.position_ids, blocks.labels)), num_items=0)
    scores = taylor_scores(tmp_path, one)

    def slope(weight: torch.Tensor, part: tuple) -> float:
        """Of the loss, by a factor on a part of a weight, in float64."""
        losses = []
        for factor in (1 + 1e-4, 1 - 1e-4):
            before = weight.data[part].clone()
            weight.data[part] *= factor
            with torch.no_grad():
                logits = model(one.input_ids, position_ids=one.position_ids, use_cache=False).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], one.labels[0, 1:]).item())
            weight.data[part] = before
        return abs(losses[0] - losses[1]) / 2e-4

    layer = model.model.layers[1]
    every = slice(None)
    neuron = slope(layer.mlp.down_proj.weight, (every, 7))
    head = slope(layer.self_attn.o_proj.weight, (every, slice(8, 16)))
    group = slope(layer.self_attn.o_proj.weight, (every, slice(0, 16)))
    assert scores.neurons[1][7].item() == pytest.approx(neuron, rel=1e-3)
    assert scores.heads[1][1].item() == pytest.approx(head, rel=1e-3)
    assert scores.groups[1][0].item() == pytest.approx(group, rel=1e-3)
