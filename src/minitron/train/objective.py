"""What is minimized: a loss of model and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..data.packing import Batch
from ..family_models import engine_decodes
from ..heads import NemotronForCausalLM
from ..ops.loss import linear_cross_entropy, shift_labels

T = TypeVar("T")

LossFunction = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, Tensor | float]]]
"""(model, batch) -> the batch's part of the mean over `batch.num_items` labels, and numbers to log, summed likewise.

Numbers are tensors without dimensions, on the model's device: the loop reads them once a step, and a loss that reads
them itself makes the device wait. The batch is of the stream's kind, see `stream.TrainingBatch`.

A loss may be a module. Its parameters that require gradients are then trained and saved with the model. If it has a
model `corrected` (a teacher that is trained beside the student), that one's learning rate is multiplied by its
`corrected_lr`."""


class Numbers:
    """Sums of numbers by name, in float64, which stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float], factor: float = 1.0) -> None:
        """Add each value, times a factor, to the sum of its name."""
        for name, value in values.items():
            term = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach() * factor
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def read(self) -> dict[str, float]:
        """The sums, in one transfer from the device."""
        return dict(zip(self._sums, torch.stack([*self._sums.values()]).tolist(), strict=True)) if self._sums else {}


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Cross-entropy of the next token in nats: summed over the batch, divided by `batch.num_items`."""
    if engine_decodes(model) and not isinstance(model, NemotronForCausalLM):
        # transformers' own loss keeps all logits in fp32; Nemotron's class computes them in chunks itself.
        causal: Any = model
        hidden = causal.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
        targets = shift_labels(batch.labels)
        return linear_cross_entropy(hidden, causal.lm_head.weight, targets, batch.num_items), {}
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        labels=batch.labels,
        num_items_in_batch=batch.num_items,
        use_cache=False,
    )
    return out.loss, {}


def models_of(model: nn.Module, loss: LossFunction) -> dict[str, nn.Module]:
    """The models that a loss runs, by the names that messages give them."""
    teacher = getattr(loss, "corrected", None) or getattr(getattr(loss, "targets", None), "model", None)
    return {"the model": model} if teacher is None else {"the student": model, "the teacher": teacher}


class Objective(nn.Module):
    """Model and loss as one module: its forward pass is all that a step computes, which is what gets sharded."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any, other: Callable[[nn.Module, Any], Any] | None = None) -> Any:
        """The loss of a batch and its numbers, or the result of an `other` function of model and batch.

        The parameters of a sharded model are whole within this call, and only there.
        """
        return (other or self.loss)(self.model, batch)

    def measure(self, work: Callable[[nn.Module], T]) -> T:
        """The result of a function of the model, which may be sharded."""
        return self(None, lambda model, _: work(model))

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
