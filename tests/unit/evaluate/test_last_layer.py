"""The last layer at some positions: the hidden states of the whole forward pass, computed for these positions only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import VARIANTS, some_tokens, tiny_model
from torch.testing import assert_close

from minitron import NemotronCache
from minitron.evaluate.last_layer import last_layer_at
from minitron.framework import CACHE_NAME

POSITIONS = torch.tensor([0, 3, 4, 10])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "no layers"])
@torch.inference_mode()
def test_hidden_states_are_those_of_the_whole_pass(variant: str, attention: str) -> None:
    model = tiny_model(torch.float64, **VARIANTS[variant], attn_implementation=attention).model
    ids = torch.tensor([some_tokens(11), some_tokens(11, seed=2)])
    whole = model(ids).last_hidden_state
    with last_layer_at(model, POSITIONS):
        found = model(ids, use_cache=False).last_hidden_state
    assert_close(found, whole[:, POSITIONS], rtol=0, atol=1e-9)
    assert torch.equal(model(ids).last_hidden_state, whole)  # the hook is gone


@torch.inference_mode()
def test_with_a_cache_and_a_mask() -> None:
    model, ids = tiny_model(torch.float64).model, torch.tensor([some_tokens(17)])
    allowed = torch.ones(17, 17, dtype=torch.bool).tril()
    allowed[9:, 7:9] = False  # later tokens do not see two earlier ones
    mask = torch.zeros(17, 17, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)[None, None]
    whole, caches = model(ids, attention_mask=mask).last_hidden_state, []
    for shortened in (False, True):
        cache = NemotronCache(config=model.config)
        more: dict[str, Any] = {CACHE_NAME: cache, "use_cache": True}
        model(ids[:, :6], **more)
        more |= {"attention_mask": mask[:, :, 6:], "position_ids": torch.arange(6, 17)[None]}
        if shortened:
            with last_layer_at(model, POSITIONS):
                found = model(ids[:, 6:], **more).last_hidden_state
        else:
            found = model(ids[:, 6:], **more).last_hidden_state[:, POSITIONS]
        assert_close(found, whole[:, 6 + POSITIONS], rtol=0, atol=1e-9)
        caches.append(cache)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@torch.inference_mode()
def test_the_last_mlp_runs_at_these_positions_only() -> None:
    model, rows = tiny_model().model, []
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    with last_layer_at(model, POSITIONS):
        model(torch.tensor([some_tokens(11)]), use_cache=False)
    assert rows == [11] * (len(model.layers) - 1) + [len(POSITIONS)]
