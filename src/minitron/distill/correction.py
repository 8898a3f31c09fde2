"""Teacher correction: a teacher learns the data of the distillation, before it or beside it.

A teacher that never saw the data a student is trained on is a worse guide on it; the second Minitron paper (2408.11796)
fine-tunes it first, or together with the student, at a fifth of its former learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..ops.loss import linear_cross_entropy, shift_labels
from .losses import DistillLoss
from .runs import TrainError
from .targets import DenseTargets, OnlineTeacher, head_weight, hidden_states

TUNE = ("full", "norms", "lora")


def choose_trained(model: nn.Module, tune: str, rank: int = 16) -> nn.Module:
    """Decide which parameters of a model are trained.

    Args:
        model: a causal language model; changed in place.
        tune: `full` for all; `norms` for the layer norms alone; `lora` for adapters on all matrices of the layers,
            which needs peft.
        rank: of the adapters.

    Returns:
        The model, for `lora` wrapped by peft. `export.export_model` merges the adapters.

    Raises:
        TrainError: an unknown choice, a rank below 1, or peft is not installed.
    """
    if tune not in TUNE:
        raise TrainError(f"tune is {tune!r}; it must be one of {', '.join(TUNE)}")
    if tune == "full":
        return model.requires_grad_(True)
    if tune == "norms":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return model
    if rank < 1:
        raise TrainError(f"the rank of the adapters is {rank}; it must be at least 1")
    try:
        from peft import LoraConfig, get_peft_model  # heavy, and an extra
    except ImportError:
        raise TrainError("tune 'lora' needs peft: pip install 'minitron[train]'") from None
    matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=matrices, task_type="CAUSAL_LM")
    return get_peft_model(model, adapter)  # type: ignore[arg-type, return-value]


def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model with LoRA adapters as those of the plain model that computes the same."""
    weights: dict[str, Tensor] = {}
    plain = model.get_base_model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" not in name:
                weights[name.replace(".base_layer.", ".")] = parameter.detach()
        for name, module in plain.named_modules():
            if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
                for adapter in module.active_adapters:
                    key = f"{name}.weight"
                    weights[key] = weights[key] + module.get_delta_weight(adapter).to(weights[key].dtype)
    return weights


class CorrectedTeacher(OnlineTeacher):
    """A teacher that answers as it is now, and keeps what its own loss needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.hidden: Tensor | None = None

    def targets_for(self, batch: Batch, layers: Sequence[int] = ()) -> DenseTargets:
        """As of `TeacherTargets`; the last hidden states stay in `hidden` with their graph."""
        self.model.eval()
        self.hidden, states = hidden_states(self.model, batch, layers)
        return DenseTargets(self.hidden.detach(), head_weight(self.model).detach(), tuple(s.detach() for s in states))


class CorrectingLoss(nn.Module):
    """A distillation loss whose teacher learns the next token of the same batch, from the same forward pass.

    The value is the student's loss; the gradient is that of the student's loss for the student and of the
    cross-entropy for the teacher. Numbers: those of the loss, and the teacher's `teacher_ce` in nats per token.

    Args:
        loss: its targets are a `CorrectedTeacher`, whose model is trained.
        corrected_lr: the teacher's learning rate as a share of the student's; the paper's is a fifth.
    """

    def __init__(self, loss: DistillLoss, corrected_lr: float = 0.2) -> None:
        super().__init__()
        if not isinstance(loss.targets, CorrectedTeacher):
            raise TrainError("a teacher is corrected beside the student only if it is online")
        self.student_loss = loss
        self.corrected = loss.targets.model
        self.corrected_lr = corrected_lr
        self._teacher = loss.targets

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """As of `LossFunction`."""
        loss, numbers = self.student_loss(model, batch)
        hidden, self._teacher.hidden = self._teacher.hidden, None
        assert hidden is not None
        labels = shift_labels(batch.labels)
        own = linear_cross_entropy(hidden, head_weight(self.corrected), labels, batch.num_items)
        return loss + (own - own.detach()), {**numbers, "teacher_ce": own.item()}
