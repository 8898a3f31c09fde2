"""Held-out text: what a model, or a loss, says about tokens that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..data.packing import PackedBlocks, collate
from ..world import World
from .machine import autocast
from .objective import LossFunction, Numbers, Objective, next_token_loss
from .stream import Measure


@dataclass(frozen=True)
class HeldoutText:
    """The mean loss over every token but the first of each document, and the same per byte of text: a `Measure`.

    Numbers: `nats_per_token`, `bits_per_byte`, and what else the loss gives, as means over tokens. The end of a
    document counts as a token, and its nats count in both.
    """

    blocks: PackedBlocks
    at_once: int
    """Blocks per forward pass."""
    loss: LossFunction = next_token_loss
    """Its number `ce` is reported if there is one, otherwise its value."""
    world: World = field(default_factory=World)
    """Processes that share the work; every one gets the result."""

    def check(self, vocab_size: int, sequence: int) -> None:
        """As of `Stream.check`."""
        self.blocks.check(vocab_size, sequence)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Measure a model in evaluation mode."""
        totals = Numbers(next(model.parameters()).device)
        for start in range(0, len(self.blocks), self.at_once * self.world.data_size):
            # Each process makes as many forward passes as the others, which sharding asks for. Where the blocks run
            # out, a process computes the first block again and counts it as nothing.
            first = start + self.at_once * self.world.data_rank
            indices = list(range(first, min(first + self.at_once, len(self.blocks))))
            pieces = [self.blocks.pieces(i) for i in indices or [0]]
            batch = collate(pieces, self.blocks.block).to(totals.device)
            loss, numbers = self.loss(model, batch)
            found = numbers if "ce" in numbers else {"ce": loss}
            totals.add(found, batch.num_items if indices else 0)
        sums = self.world.sum(totals.read())
        nats, count = sums.pop("ce"), self.blocks.num_scored
        means = {name: value / count for name, value in sums.items()}
        return {"nats_per_token": nats / count, "bits_per_byte": nats / math.log(2) / self.blocks.text_bytes, **means}


@torch.no_grad()
def measure_all(objective: Objective, measures: Mapping[str, Measure], dtype: str) -> dict[str, dict[str, float]]:
    """What each measure finds; the model keeps its mode.

    Args:
        objective: model and loss, sharded or not.
        measures: by the names of their held-out sets.
        dtype: of matrix products, as of `TrainConfig`.
    """
    model = objective.model
    was_training = model.training
    model.eval()
    with autocast(next(model.parameters()).device, dtype):
        found = {name: dict(objective.measure(measure)) for name, measure in measures.items()}
    model.train(was_training)
    return found


@torch.no_grad()
def heldout_loss(
    model: nn.Module, blocks: PackedBlocks, at_once: int, context: AbstractContextManager[Any] | None = None
) -> dict[str, float]:
    """`HeldoutText` of a causal language model in any mode, which it keeps, in one process.

    Args:
        model: the model.
        blocks: the held-out text.
        at_once: blocks per forward pass.
        context: for instance an autocast context.
    """
    was_training = model.training
    model.eval()
    with context or torch.autocast(next(model.parameters()).device.type, enabled=False):
        found = HeldoutText(blocks, at_once)(model)
    model.train(was_training)
    return found
