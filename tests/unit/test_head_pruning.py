"""Which heads stay. That pruning equals silencing is tested in tests/contract/test_transformers_features.py."""

from __future__ import annotations

import pytest
import torch
from model_samples import build, tiny, token_ids

from minitron.head_pruning import kept_heads


def test_nothing_pruned_keeps_everything() -> None:
    assert kept_heads(tiny(), 0) == (4, 2)


@pytest.mark.parametrize("key", [0, "0"])
def test_counts_follow_the_record(key: int | str) -> None:
    config = tiny()
    config.pruned_heads = {key: [0, 2]}
    assert kept_heads(config, 0) == (2, 2)
    assert kept_heads(config, 1) == (4, 2)
    config.pruned_heads = {key: [0, 1]}
    assert kept_heads(config, 0) == (2, 1)


def test_rows_and_columns_that_stay_are_the_right_ones() -> None:
    model, whole = build("NemotronModel"), build("NemotronModel")
    model.prune_heads({1: [0, 1]})  # the first group, with its key/value head
    kept, before = model.layers[1].self_attn, whole.layers[1].self_attn
    assert torch.equal(kept.q_proj.weight, before.q_proj.weight[16:])
    assert torch.equal(kept.k_proj.weight, before.k_proj.weight[8:])
    assert torch.equal(kept.v_proj.weight, before.v_proj.weight[8:])
    assert torch.equal(kept.o_proj.weight, before.o_proj.weight[:, 16:])
    assert (kept.num_heads, kept.num_key_value_heads, kept.num_key_value_groups) == (2, 1, 2)
    assert torch.equal(model.layers[0].self_attn.q_proj.weight, whole.layers[0].self_attn.q_proj.weight)


def test_dtype_and_frozen_weights_are_kept_and_training_goes_on() -> None:
    model = build().to(torch.bfloat16)
    model.model.layers[0].self_attn.v_proj.weight.requires_grad_(False)
    model.prune_heads({0: [0, 2]})
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.dtype == torch.bfloat16
    assert not attention.v_proj.weight.requires_grad
    model(token_ids(), labels=token_ids()).loss.backward()
    assert attention.q_proj.weight.grad is not None
    assert attention.v_proj.weight.grad is None


def test_layers_keep_their_own_caches() -> None:
    model = build()
    model.prune_heads({0: [2, 3]})
    past = model(token_ids()).past_key_values
    assert past[0][0].shape[1] == 1
    assert past[1][0].shape[1] == 2
