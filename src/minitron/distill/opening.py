"""The inputs of a distillation: text and two checkpoints, which must fit each other and the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.hf import check_checkpoint, read_config
from ..config import ModelConfig
from ..data.token_cache import TokenFolder
from ..loading import checkpoint_folder
from ..tokenizer import load_tokenizer
from ..train.inputs import TrainingTexts, open_texts, saved_model
from ..train.machine import uses_bfloat16
from ..train.memory import require_memory
from ..train.run_folder import TrainError, require_positions
from ..train.schedule import TrainConfig
from ..world import World
from .correction import CorrectedTeacher
from .recipe import require_same_tokens, require_same_vocabulary
from .targets import OnlineTeacher, TeacherTargets
from .teacher_cache import open_targets


@dataclass(frozen=True)
class Distillation:
    """The arguments of `recipe.distill`."""

    student: nn.Module
    targets: TeacherTargets
    teacher: nn.Module | None
    texts: TrainingTexts
    tokenizer: Any
    identity: dict[str, Any]
    """Fingerprints of the checkpoints."""
    export_dtype: torch.dtype | None
    """The dtype of the student's checkpoint, in which the result is written as well."""

    @property
    def corrected(self) -> bool:
        """Whether the teacher is trained too."""
        return isinstance(self.targets, CorrectedTeacher)

    @property
    def running(self) -> ModelConfig | None:
        """Configuration of the teacher that runs during training; None with a cache."""
        return self.targets.model.config if isinstance(self.targets, OnlineTeacher) else None  # type: ignore[return-value]


def open_distillation(
    student: str | Path,
    teacher: str | Path | None,
    data: Sequence[str] | TrainingTexts,
    config: TrainConfig,
    device: torch.device,
    world: World,
    *,
    heldout: Sequence[str] = (),
    heldout_share: float = 0.0,
    cache: Path | TokenFolder | None = None,
    field: str = "text",
    encoding: str = "utf-8",
    skip_bad: bool = False,
    correct_teacher: bool = False,
    teacher_cache: Path | None = None,
) -> Distillation:
    """Check everything that needs no weights, tokenize the text, then load both models.

    Args:
        student: any model that `locate.locate` knows; loaded in fp32.
        teacher: the same; loaded in the dtype of the matrix products, in fp32 if it is corrected. With a cache it is
            needed only for the KL of held-out text.
        data: `PATH[:WEIGHT]` of text to train on; or training and held-out text that `open_texts` opened with the
            same tokenizer and settings.
        config: the settings.
        device: where both go.
        world: the processes.
        heldout: paths of text that is only measured.
        heldout_share: share of the documents of `data` that is held out as well.
        cache: folder of token caches; required if `data` are paths.
        field, encoding, skip_bad: how text is read, as of `inputs.open_texts`.
        correct_teacher: whether the teacher is trained too.
        teacher_cache: folder of the teacher's outputs, which replace the teacher during training.

    Raises:
        ValueError: tokenizers or vocabularies differ, the memory does not suffice, or the text cannot be used.
        FileNotFoundError: a checkpoint, a tokenizer or a text does not exist.
    """
    if teacher is None and teacher_cache is None:
        raise TrainError("give --teacher, the checkpoint of the teacher, or --teacher-cache, its outputs")
    if correct_teacher and teacher_cache is not None:
        raise TrainError(
            "a teacher whose outputs come from a cache cannot be trained; "
            "give either --correct-teacher or --teacher-cache"
        )
    student = world.first_then_all(lambda: checkpoint_folder(student))
    if teacher is not None:
        teacher = world.first_then_all(lambda: checkpoint_folder(teacher))
    ours, theirs = _checked_shapes(student, teacher)
    tokenizer = shared_tokenizer(student, teacher)
    require_positions(ours, config)
    require_memory(ours, config, device, world, theirs, correct_teacher=correct_teacher)
    if isinstance(data, TrainingTexts):
        texts = data
    else:
        assert cache is not None
        folder = cache
        texts = world.first_then_all(
            lambda: open_texts(data, heldout, heldout_share, tokenizer, config, folder, field, encoding, skip_bad)
        )
    identity = {"student": world.first_does(lambda: fingerprint(student))}
    guide: Any = None
    if teacher is not None:
        path = teacher
        identity["teacher"] = world.first_does(lambda: fingerprint(path))
        wide = correct_teacher or not uses_bfloat16(device, config.dtype)
        # With a cache it takes no part in the step, so nothing shards it.
        guide = saved_model(
            teacher, device, world if teacher_cache is None else None, torch.float32 if wide else torch.bfloat16
        )
        guide.requires_grad_(correct_teacher)
    targets: TeacherTargets
    if teacher_cache is not None:
        targets = open_targets(teacher_cache, texts.stream, identity.get("teacher"))
        identity |= {"teacher": targets.meta["teacher"], "cache": targets.meta["kind"]}
    else:
        assert guide is not None
        targets = CorrectedTeacher(guide) if correct_teacher else OnlineTeacher(guide)
    model = saved_model(student, device, world)
    return Distillation(model, targets, guide, texts, tokenizer, {"checkpoints": identity}, _dtype_of(ours))


def _checked_shapes(student: Path, teacher: Path | None) -> tuple[ModelConfig, ModelConfig | None]:
    check_checkpoint(student)
    ours = read_config(student)
    if teacher is None:
        return ours, None
    check_checkpoint(teacher)
    theirs = read_config(teacher)
    require_same_vocabulary(ours, theirs, student, teacher)
    return ours, theirs


def shared_tokenizer(student: Path, teacher: Path | None) -> Any:
    """The tokenizer of both; if one folder has none, that of the other.

    Raises:
        TrainError: they differ.
        FileNotFoundError: neither has one.
    """
    found: list[Any] = []
    missing: FileNotFoundError | None = None
    for folder in (student, teacher):
        try:
            found += [] if folder is None else [load_tokenizer(folder)]
        except FileNotFoundError as error:
            missing = error
    if not found:
        assert missing is not None
        raise missing
    if len(found) == 2:
        require_same_tokens(found[0], found[1], student, teacher)
    return found[0]


def _dtype_of(config: ModelConfig) -> torch.dtype | None:
    named = getattr(config, "dtype", None)
    return getattr(torch, named, None) if isinstance(named, str) else named
