"""A snapshot notices every change of a model's parts; unchanged models get the weights of the call before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_models import tiny_model
from torch import nn

import minitron
from minitron.engine import model_weights, models
from minitron.engine.model_weights import weights_of
from minitron.engine.models import why_not_model
from minitron.engine.snapshot import Snapshot

PROMPT = torch.tensor([[5, 6, 7]])


def first(model: minitron.NemotronForCausalLM) -> Any:
    return model.model.layers[0]


EDITS: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda m: setattr(first(m).self_attn, "scaling", 9.0),
    "an attribute, by an equal object": lambda m: setattr(first(m).self_attn, "scaling", torch.tensor(0.25)),
    "a new attribute": lambda m: setattr(first(m).mlp, "forward", lambda x: x),
    "a class": lambda m: setattr(m.lm_head, "__class__", type("Other", (nn.Linear,), {})),
    "the class of the model": lambda m: setattr(m, "__class__", type("Other", (type(m),), {})),
    "a hook": lambda m: first(m).mlp.register_forward_hook(lambda module, args, out: out),
    "a module": lambda m: setattr(first(m).mlp, "up_proj", nn.Linear(3, 3)),
    "a parameter": lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.detach())),
    "the memory of a parameter": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data.clone()),
    "the strides of a parameter": lambda m: setattr(
        first(m).self_attn.q_proj.weight, "data", first(m).self_attn.q_proj.weight.data.T
    ),
    "a buffer": lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq * 2),
    "a setting": lambda m: setattr(m.config, "is_causal", False),
    "a setting in a dictionary": lambda m: m.config.rope_parameters.update(rope_theta=3.0),
    "training": lambda m: first(m).self_attn.train(),
    "the order of layers": lambda m: m.model.layers._modules.update({"0": m.model.layers[1], "1": m.model.layers[0]}),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_change_of_a_part_is_noticed(name: str) -> None:
    model = tiny_model().eval()
    before = Snapshot(model)
    assert before.holds(model)
    EDITS[name](model)
    assert not before.holds(model)


def test_a_call_of_generate_changes_nothing() -> None:
    model = tiny_model().eval()
    model.generate(PROMPT, max_new_tokens=2, eos_token_id=None)
    before = Snapshot(model)
    model.generate(PROMPT, max_new_tokens=2, eos_token_id=None)
    assert before.holds(model)


def test_the_second_call_neither_looks_at_modules_nor_builds_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().eval()
    assert not why_not_model(model)
    layers = weights_of(model).layers
    monkeypatch.setattr(models, "_why_not_modules", None)
    monkeypatch.setattr(model_weights, "from_model", None)
    assert not why_not_model(model)
    assert weights_of(model).layers is layers


def test_numbers_that_are_copied_are_compared() -> None:
    model = tiny_model().eval()
    body: Any = model.model
    vectors = [body.norm.weight, body.norm.bias, first(model).input_layernorm.weight, body.rotary_emb.inv_freq]
    for tensor in [*vectors, first(model).mlp.down_proj.weight]:
        layers = weights_of(model).layers
        tensor.detach().numpy().reshape(-1)[-1] += 1.0  # no version of the tensor changes
        assert weights_of(model).layers is not layers


def test_large_models_keep_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MOST_BYTES", 0)
    monkeypatch.setattr(model_weights, "MOST_BYTES", 0)
    model = tiny_model().eval()
    assert not why_not_model(model)
    assert weights_of(model).layers is not weights_of(model).layers
    assert model not in models._served


def test_a_model_is_freed_with_its_snapshot() -> None:
    model = tiny_model().eval()
    model.generate(PROMPT, max_new_tokens=2, eos_token_id=None)
    assert model in models._served
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
