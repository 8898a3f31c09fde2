"""Distillation on top of the training loop: checks that teacher and student fit, the loss, and the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from ..config import ModelConfig
from ..data.packing import BlockStream, PackedBlocks
from ..shapes import training_flops_per_token
from ..tokenizer import tokenizer_difference
from ..train.heldout import HeldoutText
from ..train.loop import Result, Surroundings, train
from ..train.objective import LossFunction, next_token_loss
from ..train.run_folder import TrainError
from ..train.schedule import TrainConfig
from ..train.stream import Measure
from ..world import World
from .correction import CorrectedTeacher, CorrectingLoss
from .losses import DistillLoss, DistillOptions
from .targets import OnlineTeacher, TeacherTargets


def require_same_tokens(student: Any, teacher: Any, student_name: object, teacher_name: object) -> None:
    """Refuse tokenizers that do not encode the same text as the same ids.

    Raises:
        TrainError: they differ; the message says how.
    """
    what = tokenizer_difference(student, teacher, names=("the student's", "the teacher's"))
    if what:
        raise TrainError(
            f"the tokenizers of {student_name} and {teacher_name} differ: {what}. Distillation compares the two models "
            f"token by token, so both must have the same tokenizer"
        )


def require_same_vocabulary(
    student: ModelConfig, teacher: ModelConfig, student_name: object, teacher_name: object
) -> None:
    """Refuse models with different numbers of tokens.

    Raises:
        TrainError: they differ.
    """
    if student.vocab_size != teacher.vocab_size:
        raise TrainError(
            f"{student_name} has vocab_size {student.vocab_size} and {teacher_name} {teacher.vocab_size}; "
            f"distillation compares their logits one by one, so both must be the same"
        )


def make_loss(
    targets: TeacherTargets, options: DistillOptions, student: nn.Module, corrected_lr: float = 0.2, seed: int = 0
) -> LossFunction:
    """The loss of a student, on its device; if the targets are a `CorrectedTeacher`, the loss trains it as well.

    A projection depends on `seed` alone, so that every process of a run starts with the same one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = DistillLoss(targets, options, student.config)  # type: ignore[arg-type]
    device = next(student.parameters()).device
    if device.type != "meta":  # otherwise sharding moves it
        loss.to(device)
    return CorrectingLoss(loss, corrected_lr) if isinstance(targets, CorrectedTeacher) else loss


def distill(
    student: nn.Module,
    targets: TeacherTargets,
    stream: BlockStream,
    config: TrainConfig,
    run: Path,
    *,
    options: DistillOptions | None = None,
    teacher: nn.Module | None = None,
    corrected_lr: float = 0.2,
    identity: Mapping[str, Any] | None = None,
    heldout: Mapping[str, PackedBlocks | Measure] | None = None,
    **surroundings: Unpack[Surroundings],
) -> Result:
    """Distil a teacher into a student, or continue the run in `run`.

    Args:
        student: the model that learns, on its device, in fp32; changed in place.
        targets: the teacher's outputs: `OnlineTeacher(model)`, a cache, or `CorrectedTeacher(model)`, a teacher that
            is trained on the next tokens of the same batches at the same time.
        options: which losses; the logits' alone if None.
        teacher: a model to compare the student with on held-out text; that of `targets` by default. Without one only
            the cross-entropy is measured.
        corrected_lr: learning rate of a `CorrectedTeacher` as a share of the student's.
        identity: what distinguishes this teacher from others, for instance `{"teacher": fingerprint}`.
        heldout: as of `train`; of text the result has `kl`, in nats per token, and `top1`, the share of tokens where
            teacher and student agree, beside `nats_per_token` and `bits_per_byte`.
        **surroundings: as of `train`.

    Raises:
        ValueError: teacher and student do not fit together, or as of `train`.
    """
    options = options or DistillOptions()
    shape: ModelConfig = student.config  # type: ignore[assignment]
    corrected = isinstance(targets, CorrectedTeacher)
    online = targets.model if isinstance(targets, OnlineTeacher) else teacher
    measure: LossFunction = next_token_loss
    if online is not None:
        measure = DistillLoss(OnlineTeacher(online), DistillOptions(), shape)
    world = surroundings.get("world") or World()
    measures: dict[str, Measure] = {
        name: HeldoutText(held, config.at_once(world.data_size), measure, world)
        if isinstance(held, PackedBlocks)
        else held
        for name, held in (heldout or {}).items()
    }
    about = {"loss": asdict(options), **({"corrected_lr": corrected_lr} if corrected else {}), **(identity or {})}
    running: ModelConfig | None = targets.model.config if isinstance(targets, OnlineTeacher) else None  # type: ignore[assignment]
    return train(
        student,
        stream,
        config,
        run,
        loss=make_loss(targets, options, student, corrected_lr, config.seed),
        heldout=measures,
        identity=about,
        flops_per_token=training_flops_per_token(shape, config.sequence, running, corrected),
        **surroundings,
    )
