"""Teacher correction: a teacher is fine-tuned on the data of the distillation, during it.

A teacher that never saw the data of the student teaches it less well. The second Minitron paper (2408.11796) fine-tunes
it first, or together with the student, at a fifth of its former learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..data.packing import Batch
from ..ops.loss import linear_cross_entropy, shift_labels
from ..train.run_folder import TrainError
from .losses import DistillLoss
from .targets import DenseTargets, OnlineTeacher, head_weight, hidden_states


class CorrectedTeacher(OnlineTeacher):
    """A teacher that is trained, so its outputs change; it keeps what its own loss needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.hidden: Tensor | None = None

    def targets_for(self, batch: Batch, layers: Sequence[int] = ()) -> DenseTargets:
        """As of `TeacherTargets`; the last hidden states stay in `hidden` with their graph."""
        self.model.eval()
        self.hidden, states = hidden_states(self.model, batch, layers)
        return DenseTargets(self.hidden.detach(), head_weight(self.model).detach(), tuple(s.detach() for s in states))


class CorrectingLoss(nn.Module):
    """A distillation loss that also trains the teacher, on the next tokens of the same batch and forward pass.

    The value is the student's loss; the gradient is that of the student's loss for the student and of the
    cross-entropy for the teacher. Numbers: those of the loss, and the teacher's `teacher_ce` in nats per token.

    Args:
        loss: its targets are a `CorrectedTeacher`, whose model is trained.
        corrected_lr: the teacher's learning rate as a share of the student's; the paper's is a fifth.
    """

    def __init__(self, loss: DistillLoss, corrected_lr: float = 0.2) -> None:
        super().__init__()
        if not isinstance(loss.targets, CorrectedTeacher):
            raise TrainError(
                "only a teacher that runs during training can be corrected; its targets must be a CorrectedTeacher"
            )
        self.student_loss = loss
        self.corrected = loss.targets.model
        self.corrected_lr = corrected_lr
        self._teacher = loss.targets

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """As of `LossFunction`."""
        loss, numbers = self.student_loss(model, batch)
        hidden, self._teacher.hidden = self._teacher.hidden, None
        assert hidden is not None
        labels = shift_labels(batch.labels)
        own = linear_cross_entropy(hidden, head_weight(self.corrected), labels, batch.num_items)
        return loss + (own - own.detach()), {**numbers, "teacher_ce": own.detach()}
