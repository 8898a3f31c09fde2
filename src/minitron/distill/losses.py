"""Distillation losses for the training loop: (model, batch) -> (loss, numbers).

The losses are those of the Minitron paper (2407.14679, section 2.3): L = L_logits + ce_weight L_CLM + alpha L_is, of
which the paper's final models use L_logits alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from ..data.packing import Batch
from ..ops.head_loss import FORWARD_KL, KINDS
from ..ops.kl import Divergence, linear_divergence, linear_sparse_divergence
from ..ops.loss import IGNORE_INDEX, shift_labels
from .targets import DenseTargets, SparseTargets, TeacherTargets, head_weight, hidden_states

HIDDEN_LOSSES = ("cosine", "mse")


@dataclass(frozen=True)
class DistillOptions:
    """Which losses to use; the default is the paper's choice, the forward KL of the logits alone."""

    kind: str = FORWARD_KL
    """`forward_kl`, `reverse_kl` or `jsd`."""
    temperature: float = 1.0
    """Divides the logits of both models; the loss is not multiplied by its square."""
    ce_weight: float = 0.0
    """Weight of the next token's cross-entropy."""
    hidden: str | None = None
    """`cosine` (1 - cosine) or `mse` (mean over channels) of hidden states; None for none."""
    layer_map: tuple[tuple[int, int], ...] | None = None
    """(teacher layer, student layer) from 0; None for the third from the end of both, the paper's 29:13."""
    embeddings: bool = False
    """Whether the embeddings are compared too; needs `hidden`."""
    alpha: float | None = None
    """Weight of the hidden-state losses; None for L_logits / L_is, computed for each batch."""

    def __post_init__(self) -> None:
        """Refuse invalid values."""
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be greater than 0")
        if self.ce_weight < 0:
            raise ValueError(f"ce_weight is {self.ce_weight}; it must be 0 or more")
        if self.hidden is not None and self.hidden not in HIDDEN_LOSSES:
            raise ValueError(f"hidden is {self.hidden!r}; it must be one of {', '.join(HIDDEN_LOSSES)}, or None")
        if self.hidden is None and (self.embeddings or self.layer_map or self.alpha is not None):
            raise ValueError(
                "embeddings, layer_map and alpha belong to a hidden-state loss; set hidden to cosine or mse"
            )


class DistillLoss(nn.Module):
    """Loss of a student against a teacher's targets; usable as the `loss` of `train`.

    With a hidden-state loss it has a parameter, the shared projection from the student's width to the teacher's,
    which is trained and saved with the student; otherwise it has none.

    Args:
        targets: the teacher's outputs.
        options: which losses to use.
        student: the student's configuration.

    Raises:
        ValueError: vocabularies that differ, layers that do not exist, or targets that do not support the options.
    """

    def __init__(self, targets: TeacherTargets, options: DistillOptions, student: ModelConfig) -> None:
        super().__init__()
        if targets.vocab_size != student.vocab_size:
            raise ValueError(
                f"the teacher has {targets.vocab_size} tokens and the student {student.vocab_size}; "
                f"both must have the same tokenizer and vocabulary"
            )
        if not targets.hidden_size and (options.kind != FORWARD_KL or options.temperature != 1):
            raise ValueError(
                f"a sparse cache of the teacher supports only forward_kl at temperature 1; "
                f"kind is {options.kind!r} and temperature {options.temperature}"
            )
        self.targets, self.options = targets, options
        self.teacher_layers: tuple[int, ...] = ()
        self.student_layers: tuple[int, ...] = ()
        self.projection: nn.Linear | None = None
        if options.hidden is not None:
            pairs = _layer_map(options, targets.num_layers, student.num_hidden_layers)
            self.teacher_layers, self.student_layers = (tuple(side) for side in zip(*pairs, strict=True))
            self.projection = nn.Linear(student.hidden_size, targets.hidden_size, bias=False)

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The batch's part of the mean over `batch.num_items` labels, and numbers to log, summed likewise.

        Numbers, as tensors on the device: the divergence under the name of its kind (`kl` for the forward one; 0 for
        equal models), `ce` in nats per token, `top1` the share of tokens where both agree on the most likely one, and
        with a hidden-state loss `hidden` (L_is) and `alpha`.
        """
        targets = self.targets.targets_for(batch, self.teacher_layers)
        hidden, states = hidden_states(model, batch, self.student_layers)
        labels = shift_labels(batch.labels)
        result = self._compare(hidden, head_weight(model), targets, labels, batch.num_items)
        sums = torch.stack(result[1:]) / batch.num_items
        loss = result.loss
        names = ["kl" if self.options.kind == FORWARD_KL else self.options.kind, "ce", "top1"]
        if self.projection is not None and isinstance(targets, DenseTargets):
            between = self._hidden_loss(states, targets.states, labels != IGNORE_INDEX) / batch.num_items
            alpha = self._alpha(sums[0], between)
            loss = loss + alpha * between
            share = (labels != IGNORE_INDEX).sum().to(between.dtype) / batch.num_items
            sums = torch.cat([sums, torch.stack([between.detach(), alpha * share]).to(sums)])
            names += ["hidden", "alpha"]
        return loss, dict(zip(names, sums.unbind(), strict=True))

    def _compare(
        self, hidden: Tensor, head: Tensor, targets: DenseTargets | SparseTargets, labels: Tensor, num_items: int
    ) -> Divergence:
        options = self.options
        if isinstance(targets, DenseTargets):
            return linear_divergence(
                hidden,
                head,
                targets.hidden,
                targets.head,
                labels,
                kind=options.kind,
                temperature=options.temperature,
                ce_weight=options.ce_weight,
                num_items=num_items,
            )
        return linear_sparse_divergence(
            hidden,
            head,
            targets.ids,
            targets.shares,
            targets.entropy,
            labels,
            top=targets.top,
            ce_weight=options.ce_weight,
            num_items=num_items,
        )

    def _hidden_loss(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], kept: Tensor) -> Tensor:
        """Sum over layers and scored tokens, at least in fp32."""
        assert self.projection is not None
        wide = torch.promote_types(self.projection.weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=kept.device)
        for s, t in zip(student, teacher, strict=True):
            up, t = self.projection(s[kept].to(self.projection.weight.dtype)).to(wide), t[kept].to(wide)
            if self.options.hidden == "cosine":
                total = total + (1 - F.cosine_similarity(up, t, dim=-1)).sum()
            else:
                total = total + (up - t).square().mean(dim=-1).sum()
        return total

    def _alpha(self, logits: Tensor, between: Tensor) -> Tensor:
        if self.options.alpha is not None:
            return torch.full_like(between, self.options.alpha, requires_grad=False)
        smallest = torch.finfo(between.dtype).tiny
        return (logits / between.detach().clamp(min=smallest)).to(between.dtype)


def _layer_map(options: DistillOptions, teacher: int, student: int) -> tuple[tuple[int, int], ...]:
    if not teacher:
        raise ValueError("a hidden-state loss needs the teacher's hidden states, which a cache does not hold")
    if options.layer_map is None and min(teacher, student) < 3:
        raise ValueError(
            f"without a layer map the third layers from the end are compared; the teacher has {teacher} layers and the "
            f"student {student}: name pairs of layers, such as --layer-map {teacher - 1}:{student - 1}"
        )
    pairs = options.layer_map if options.layer_map is not None else ((teacher - 3, student - 3),)
    for t, s in pairs:
        if not (0 <= t < teacher and 0 <= s < student):
            raise ValueError(
                f"layer map {t}:{s} does not fit; the teacher's layers are 0 to {teacher - 1}, "
                f"the student's 0 to {student - 1}"
            )
    return ((-1, -1), *pairs) if options.embeddings else tuple(pairs)
