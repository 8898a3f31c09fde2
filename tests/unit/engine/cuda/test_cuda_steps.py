"""The pieces of a decode step: put together they are the model, for every family."""

from __future__ import annotations

import pytest
import torch
from active_neurons import compacted
from engine_models import VARIANTS, some_tokens, tiny_model
from family_samples import KINDS, kind_config, small_model
from torch import Tensor

from minitron.engine.cuda.steps import Rows, TorchSteps, decode_step
from minitron.engine.kv import KeyValues
from minitron.engine.weights import EngineWeights, from_model

SPAN = 24


def rows_of(tokens: list[int], positions: list[int], slots: list[int], in_order: bool = False) -> Rows:
    ends = [position + 1 for position in positions]
    return Rows(*(torch.tensor(part) for part in (tokens, positions, slots, ends)), span=SPAN, in_order=in_order)


def decoded(weights: EngineWeights, texts: list[list[int]]) -> Tensor:
    """Logits (texts, T, V) of texts of one length, a token of each in every step."""
    kv, slots = KeyValues(weights, SPAN, len(texts)), list(range(len(texts)))
    steps = [
        decode_step(TorchSteps(), weights, kv, rows_of(list(tokens), [at] * len(texts), slots, in_order=True))[1]
        for at, tokens in enumerate(zip(*texts, strict=True))
    ]
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_model_of_every_family(kind: str) -> None:
    model = small_model(kind_config(kind))
    texts = [some_tokens(11, seed=seed) for seed in range(3)]
    with torch.inference_mode():
        exact = model.double()(torch.tensor(texts)).logits
        found = decoded(from_model(model.float()), texts)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_the_model_for_every_shape_of_nemotron(variant: str) -> None:
    model, text = tiny_model(**VARIANTS[variant]), some_tokens(9)
    with torch.inference_mode():
        exact = model.double()(torch.tensor([text])).logits
        found = decoded(from_model(model.float()), [text])
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


def test_rows_of_one_slot_attend_to_each_other_and_only_backwards() -> None:
    weights, text = from_model(tiny_model()), some_tokens(7)
    expected = decoded(weights, [text])[0]
    kv = KeyValues(weights, SPAN, 3)
    first = decode_step(TorchSteps(), weights, kv, rows_of(text[:3], [0, 1, 2], [1, 1, 1]))[1]
    rest = decode_step(TorchSteps(), weights, kv, rows_of(text[3:], [3, 4, 5, 6], [1] * 4))[1]
    torch.testing.assert_close(torch.cat([first, rest]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 64), (3, 100), (5, 7)])
def test_compaction_lists_the_active_neurons_in_order(shape: tuple[int, int], share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) >= share)
    index, counts = compacted(values, 16)
    listed = [int(n) for row, count in zip(index, counts, strict=True) for n in row[:count]]
    assert listed == [n for n in range(shape[1]) if any(values[:, n] != 0)]
    assert all((row[count:] == -1).all() for row, count in zip(index, counts, strict=True))
    assert all((row[:count] // 16 == block).all() for block, (row, count) in enumerate(zip(index, counts, strict=True)))
