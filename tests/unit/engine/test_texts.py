"""Texts that grow one by one: columns are complete in order, and the calls are those of texts that grow together."""

from __future__ import annotations

import random
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from minitron.engine.rules import Rules
from minitron.engine.texts import Texts


class EndsAt(StoppingCriteria):
    """Ends text r at column `columns[r]`."""

    def __init__(self, columns: list[int]) -> None:
        self.columns = columns
        self.asked: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.asked.append(input_ids.tolist())
        return torch.tensor([input_ids.shape[1] >= column for column in self.columns])


class Collect:
    def __init__(self) -> None:
        self.columns: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.columns.append(value.tolist())

    def end(self) -> None:
        pass


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 9), min_size=12, max_size=12), min_size=1, max_size=5),
    ends=st.sets(st.integers(0, 9), min_size=1, max_size=2),
    stops=st.lists(st.integers(4, 20), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_columns_are_complete_in_order(texts: list[list[int]], ends: set[int], stops: list[int], seed: int) -> None:
    """`texts` are what a model would write; they are appended in pieces of any length, or all token by token."""
    B, begin, pick, found = len(texts), 3, random.Random(seed), []
    for together in (True, False):
        criterion, collect = EndsAt(stops[:B]), Collect()
        criteria = StoppingCriteriaList([EosTokenCriteria(sorted(ends)), criterion])
        config = GenerationConfig(max_length=begin + 12)
        rules = Rules(LogitsProcessorList(), criteria, config, B)
        grown = Texts(torch.full((B, begin), 50), [row % begin for row in range(B)], rules, collect)
        counts = []
        while not grown.ended:
            for row in list(grown.running):
                assert grown.tokens(row) == [50] * (begin - row % begin) + texts[row][: grown.new(row)]
                assert grown.left(row) == 12 - grown.new(row) > 0
                count = 1 if together else pick.randrange(4)
                grown.extend(row, texts[row][grown.new(row) :][:count])
            counts += grown.complete()
        found.append((grown.ids.tolist(), collect.columns, criterion.asked, counts))
    assert found[0] == found[1]
    ids, _, _, counts = found[0]
    lengths = []
    for row, text in enumerate(texts):
        length = min(next((at for at, token in enumerate(text, 1) if token in ends), 12), max(1, stops[row] - begin))
        assert ids[row][begin : begin + length] == text[:length]
        assert set(ids[row][begin + length :]) <= {0}  # padding
        lengths.append(length)
    assert counts == [sum(length > column for length in lengths) for column in range(max(lengths))]
