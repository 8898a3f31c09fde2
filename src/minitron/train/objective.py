"""What is minimized: a loss of model and batch, and what is measured on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.packing import Batch, PackedBlocks, collate
from ..world import World

LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, float]]]
"""(model, batch) -> the batch's part of the mean over `batch.num_items` labels, and numbers to log, summed likewise.

A loss may be a module. What it has of parameters that require gradients is then trained and saved with the model; its
`corrected` (a teacher that learns beside the student), if it has one, with the learning rate times `corrected_lr`."""


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the next token in nats: summed over the batch, divided by `batch.num_items`."""
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        labels=batch.labels,
        num_items_in_batch=batch.num_items,
        use_cache=False,
    )
    return out.loss, {}


def models_of(model: nn.Module, loss: LossFunction) -> dict[str, nn.Module]:
    """The models that a loss runs, by what their users call them."""
    teacher = getattr(loss, "corrected", None) or getattr(getattr(loss, "targets", None), "model", None)
    return {"the model": model} if teacher is None else {"the student": model, "the teacher": teacher}


class Objective(nn.Module):
    """Model and loss as one module: its forward pass is all that a step computes, which is what gets sharded."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch, other: LossFunction | None = None) -> tuple[Tensor, dict[str, float]]:
        """The loss, or the `other` one, of a batch."""
        return (other or self.loss)(self.model, batch)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters by the model's names, then trained ones of the loss as `loss.NAME`."""
        yield from self.model.named_parameters()
        if isinstance(self.loss, nn.Module):
            yield from ((f"loss.{name}", p) for name, p in self.loss.named_parameters() if p.requires_grad)

    def trained_models(self) -> list[nn.Module]:
        """The model, and a teacher under correction."""
        teacher = getattr(self.loss, "corrected", None)
        return [self.model] if teacher is None else [self.model, teacher]

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """(factor of the learning rate, trained parameters): student and loss, then a teacher under correction."""
        teacher = getattr(self.loss, "corrected", None)
        theirs = {id(p) for p in teacher.parameters()} if teacher is not None else set()
        trained = [p for _, p in self.own_parameters() if p.requires_grad]
        groups = [(1.0, [p for p in trained if id(p) not in theirs])]
        if theirs:
            groups += [(self.loss.corrected_lr, [p for p in trained if id(p) in theirs])]  # type: ignore[attr-defined]
        return groups


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    blocks: PackedBlocks,
    at_once: int,
    context: AbstractContextManager[Any] | None = None,
    *,
    measure: Callable[[Batch], dict[str, float]] | None = None,
    world: World | None = None,
) -> dict[str, float]:
    """Mean loss over every token but the first of each document, and the same per byte of text.

    Args:
        model: a causal language model in any mode; evaluated in eval mode.
        blocks: the held-out text.
        at_once: blocks per forward pass.
        context: for instance an autocast context.
        measure: what is measured instead of the model's cross-entropy: a batch's part of means over
            `batch.num_items`, among them `ce`.
        world: processes that share the work; every one gets the result.

    Returns:
        `nats_per_token`, `bits_per_byte`, and what else `measure` gives. The end of a document counts as a token, and
        its nats count in both.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    totals: dict[str, float] = {"ce": 0.0}
    device = next(model.parameters()).device
    for start in range(0, len(blocks), at_once * world.data_size):
        # Each process makes as many forward passes as the others, which sharding asks for; the last may be idle ones.
        first = start + at_once * world.data_rank
        numbers = list(range(first, min(first + at_once, len(blocks))))
        batch = collate([blocks.pieces(i) for i in numbers or [0]], blocks.block).to(device)
        with context or torch.autocast(device.type, enabled=False):
            found = measure(batch) if measure else {"ce": next_token_loss(model, batch)[0].item()}
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + (value * batch.num_items if numbers else 0.0)
    model.train(was_training)
    totals = world.sum(totals)
    nats = totals.pop("ce")
    more = {name: value / blocks.num_scored for name, value in totals.items()}
    return {"nats_per_token": nats / blocks.num_scored, "bits_per_byte": nats / math.log(2) / blocks.text_bytes, **more}
