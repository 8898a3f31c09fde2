"""Logits that are computed when they are read, in whatever way they are read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from minitron.outputs import DeferredLogitsOutput

LOGITS = torch.arange(6.0).view(1, 2, 3)

READERS: dict[str, Callable[[Any], torch.Tensor]] = {
    "attribute": lambda out: out.logits,
    "key": lambda out: out["logits"],
    "position": lambda out: out[1],
    "slice": lambda out: out[1:][0],
    "slice from the front": lambda out: out[:2][1],
    "tuple": lambda out: out.to_tuple()[1],
    "get": lambda out: out.get("logits"),
    "items": lambda out: dict(out.items())["logits"],
    "values": lambda out: list(out.values())[1],
    "dict": lambda out: dict(out)["logits"],
    "unpacking": lambda out: {**out}["logits"],
    "getattr": lambda out: getattr(out, "logits", None),
    "copy": lambda out: copy.copy(out).logits,
    "negative position": lambda out: out[-1],
}


@pytest.fixture
def calls() -> list[int]:
    return []


@pytest.fixture
def out(calls: list[int]) -> DeferredLogitsOutput:
    def compute() -> torch.Tensor:
        calls.append(1)
        return LOGITS

    return DeferredLogitsOutput.of(compute, loss=torch.tensor(2.0))


@pytest.mark.parametrize("way", READERS)
def test_every_way_of_reading_computes_them_once(way: str, out: Any, calls: list[int]) -> None:
    assert calls == []
    assert torch.equal(READERS[way](out), LOGITS)
    assert torch.equal(out.logits, LOGITS)
    assert len(calls) == (1 if way != "copy" else len(calls))


def test_reading_the_loss_computes_nothing(out: Any, calls: list[int]) -> None:
    for loss in (out.loss, out["loss"], out[0], out.get("loss"), getattr(out, "loss", None)):
        assert loss == 2.0
    assert "loss" in out
    assert "logits" in out
    assert list(out.keys()) == ["loss", "logits"]
    assert out.get("attentions", 5) == 5
    assert len(out) == 2
    assert isinstance(out, CausalLMOutputWithPast)
    assert calls == []


def test_fields_that_are_none_are_left_out(calls: list[int]) -> None:
    out = DeferredLogitsOutput.of(lambda: LOGITS, loss=torch.tensor(1.0), past_key_values=None, hidden_states=(LOGITS,))
    assert list(out.keys()) == ["loss", "logits", "hidden_states"]
    assert [type(entry).__name__ for entry in out.to_tuple()] == ["Tensor", "Tensor", "tuple"]


def test_they_can_be_replaced(out: Any, calls: list[int]) -> None:
    out.logits = LOGITS + 1
    assert torch.equal(out["logits"], LOGITS + 1)
    assert calls == []


def test_what_is_pickled_holds_tensors(out: Any) -> None:
    again = pickle.loads(pickle.dumps(out))
    assert torch.equal(again.logits, LOGITS)
    assert again.loss == 2.0
