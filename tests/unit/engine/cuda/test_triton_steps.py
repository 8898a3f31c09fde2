"""A decode step of kernels, against one of torch operations; and when there is none."""

from __future__ import annotations

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_samples import kind_config, small_model
from kernel_cases import DEVICE

from minitron.engine.cuda import triton_steps
from minitron.engine.cuda.steps import Rows, TorchSteps, decode_step
from minitron.engine.cuda.triton_steps import TritonSteps, steps_for, why_no_kernels
from minitron.engine.kv import KeyValues
from minitron.engine.weights import EngineWeights, from_model

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SPAN = 16


def rows_of(tokens: list[int], positions: list[int], slots: list[int], in_order: bool) -> Rows:
    ends = [position + 1 for position in positions]
    at = (torch.tensor(part, device=DEVICE) for part in (tokens, positions, slots, ends))
    return Rows(*at, span=SPAN, in_order=in_order)


def decoded(steps: TorchSteps, weights: EngineWeights) -> list[torch.Tensor]:
    """Hidden states and logits of a prompt's three tokens, then of a token for each of two texts; and the keys."""
    kv: Any = KeyValues(weights, SPAN, 2)
    kv.keys, kv.values = ([part.to(DEVICE) for part in parts] for parts in (kv.keys, kv.values))
    kv.rotary = tuple(table.to(DEVICE) for table in kv.rotary)
    first = decode_step(steps, weights, kv, rows_of([5, 6, 7], [0, 1, 2], [1, 1, 1], in_order=False))
    second = decode_step(steps, weights, kv, rows_of([8, 9], [0, 3], [0, 1], in_order=True))
    return [*first[:2], *second[:2], torch.stack(kv.keys)]


def weights_of(kind: str, format: Any) -> EngineWeights:
    return moved(from_model(small_model(kind_config(kind, num_hidden_layers=1, vocab_size=40)).float(), format))


def moved(part: Any) -> Any:
    """A copy of weights on the device of these tests."""
    if isinstance(part, torch.Tensor):
        return part.to(DEVICE)
    if isinstance(part, list):
        return [moved(each) for each in part]
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return dataclasses.replace(part, **{f.name: moved(getattr(part, f.name)) for f in dataclasses.fields(part)})
    return part


@pytest.mark.parametrize(("kind", "format"), [("nemotron", None), ("llama-biased", None), ("qwen3", "int4")])
def test_kernels_are_the_reference(kind: str, format: Any) -> None:
    weights = weights_of(kind, format)
    expected = decoded(TorchSteps(), weights)
    found = decoded(TritonSteps(weights), weights)
    for one, other in zip(found, expected, strict=True):
        share = 1e-4 if format is None else 0.1
        torch.testing.assert_close(one, other, rtol=share, atol=share * float(other.abs().max()))


def test_queries_keys_and_values_are_in_memory_once() -> None:
    weights = weights_of("nemotron", "int8")
    before = [layer.k.data.clone() for layer in weights.layers]
    steps = TritonSteps(weights)
    for layer, rows in zip(weights.layers, before, strict=True):
        assert torch.equal(layer.k.data, rows)
        whole = steps._qkv[id(layer)].data
        assert {part.data.untyped_storage().data_ptr() for part in (layer.q, layer.k, layer.v)} == {
            whole.untyped_storage().data_ptr()
        }


def test_more_rows_than_the_kernels_take_run_as_torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_steps, "MOST_ROWS", 1)
    weights = weights_of("nemotron", None)
    for one, other in zip(decoded(TritonSteps(weights), weights), decoded(TorchSteps(), weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def stand_in(format: str = "bf16", device: str = "cuda") -> Any:
    data = SimpleNamespace(device=torch.device(device))
    matrix = SimpleNamespace(data=data, format=format)
    return SimpleNamespace(embed=matrix, head=matrix, format=format, layers=[])


def test_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert why_no_kernels(stand_in(device="cpu")) == "the weights are on the CPU; kernels run on CUDA devices"
    assert why_no_kernels(stand_in("bf12")) == (
        "the format of the weights is 'bf12'; kernels read bf16, fp16, fp32, int8, int4"
    )
    assert why_no_kernels(stand_in()) == "Tesla T4 has compute capability 7.5; kernels need 8.0 or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert why_no_kernels(stand_in()) == ""
    assert type(steps_for(stand_in())) is TritonSteps
    assert type(steps_for(stand_in(), kernels=False)) is TorchSteps
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_no_kernels(stand_in()) == "Triton is not installed: pip install 'minitron[gpu]'"
    assert type(steps_for(stand_in())) is TorchSteps
    with pytest.raises(ValueError, match="Triton kernels cannot be used: Triton is not installed"):
        steps_for(stand_in(), kernels=True)
