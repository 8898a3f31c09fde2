"""Held-out text: what a model, or a loss, says about tokens that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.packing import Batch, PackedBlocks, collate
from ..world import World
from .objective import LossFunction, Numbers, next_token_loss


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
def heldout_loss(
    model: nn.Module,
    blocks: PackedBlocks,
    at_once: int,
    context: AbstractContextManager[Any] | None = None,
    *,
    measure: Callable[[Batch], Mapping[str, Tensor | float]] | None = None,
    world: World | None = None,
) -> dict[str, float]:
    """`HeldoutText` of a causal language model in any mode, which it keeps.

    Args:
        model: the model.
        blocks: the held-out text.
        at_once: blocks per forward pass.
        context: for instance an autocast context.
        measure: what is measured instead of the model's cross-entropy: a batch's part of means over
            `batch.num_items`, among them `ce`.
        world: processes that share the work; every one gets the result.
    """
    was_training = model.training
    model.eval()
    text = HeldoutText(blocks, at_once, world=world or World())
    if measure is not None:
        text = replace(text, loss=lambda _, batch: (torch.zeros(()), measure(batch)))
    with context or torch.autocast(next(model.parameters()).device.type, enabled=False):
        found = text(model)
    model.train(was_training)
    return found
