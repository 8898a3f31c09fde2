"""What a distillation starts from: two checkpoints, checked against each other and against the memory, and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.hf import check_checkpoint, read_config
from ..config import NemotronConfig
from ..model import NemotronForCausalLM
from ..tokenizer import load_tokenizer
from .correction import CorrectedTeacher
from .inputs import Texts, open_texts, saved_model
from .machine import uses_bfloat16
from .memory import available_bytes, require_fit
from .recipe import require_same_tokens, require_same_vocabulary
from .schedule import TrainConfig
from .targets import OnlineTeacher, TeacherTargets
from .world import World


@dataclass(frozen=True)
class Distillation:
    """All that `recipe.distill` wants."""

    student: nn.Module
    targets: TeacherTargets
    teacher: nn.Module | None
    texts: Texts
    tokenizer: Any
    identity: dict[str, Any]
    """Which checkpoints these are, by their content."""
    export_dtype: torch.dtype | None
    """The dtype of the student's checkpoint, in which its successor is written."""

    @property
    def corrected(self) -> bool:
        """Whether the teacher learns too."""
        return isinstance(self.targets, CorrectedTeacher)

    @property
    def running(self) -> NemotronConfig | None:
        """Shape of the teacher that runs beside the student; None if a cache stands for it."""
        return self.targets.model.config if isinstance(self.targets, OnlineTeacher) else None  # type: ignore[return-value]


def open_distillation(
    student: Path,
    teacher: Path,
    data: Sequence[str],
    config: TrainConfig,
    device: torch.device,
    world: World,
    *,
    heldout: Sequence[str] = (),
    heldout_share: float = 0.0,
    cache: Path,
    field: str = "text",
    correct_teacher: bool = False,
) -> Distillation:
    """Check what can be checked without loading weights, tokenize, then load both models.

    Args:
        student: checkpoint folder; loaded in fp32.
        teacher: checkpoint folder; loaded in the dtype of the matrix products, in fp32 if it is corrected.
        data: `PATH[:WEIGHT]` of text to train on.
        config: the settings.
        device: where both go.
        world: the processes.
        heldout: paths of text that is only measured.
        heldout_share: part of the documents of `data` that is held out besides.
        cache: folder of token caches.
        field: which field or column holds the text, in files that have some.
        correct_teacher: whether the teacher is trained beside the student.

    Raises:
        ValueError: tokenizers or vocabularies differ, the memory does not suffice, or the text cannot be used.
        FileNotFoundError: a checkpoint, a tokenizer or a text is not there.
    """
    check_checkpoint(student)
    check_checkpoint(teacher)
    ours, theirs = read_config(student), read_config(teacher)
    require_same_vocabulary(ours, theirs, student, teacher)
    tokenizer = shared_tokenizer(student, teacher)
    half = uses_bfloat16(device, config.dtype)
    processes = 1 if world.mesh is None else world.mesh.size()
    free = available_bytes(device)
    if device.type == "cpu" and free is not None:
        free //= processes  # of this machine, in whose memory all of them are
    require_fit(ours, config, theirs, free, bfloat16=half, correct_teacher=correct_teacher, processes=world.size)
    texts = world.first_then_all(lambda: open_texts(data, heldout, heldout_share, tokenizer, config, cache, field))
    model = saved_model(student).to(device)  # type: ignore[arg-type]
    wide = correct_teacher or not half
    guide = NemotronForCausalLM.from_pretrained(teacher, dtype=torch.float32 if wide else torch.bfloat16)
    guide.to(device).requires_grad_(correct_teacher)
    identity = world.first_does(lambda: {"student": fingerprint(student), "teacher": fingerprint(teacher)})
    return Distillation(
        model,
        CorrectedTeacher(guide) if correct_teacher else OnlineTeacher(guide),
        guide,
        texts,
        tokenizer,
        {"checkpoints": identity},
        _dtype_of(ours),
    )


def shared_tokenizer(student: Path, teacher: Path) -> Any:
    """The tokenizer of both; that of the teacher if the student's folder has none.

    Raises:
        TrainError: they differ.
        FileNotFoundError: neither has one.
    """
    try:
        ours: Any = load_tokenizer(student)
    except FileNotFoundError:
        ours = None
    theirs: Any = load_tokenizer(teacher)
    if ours is not None:
        require_same_tokens(ours, theirs, student, teacher)
    return ours if ours is not None else theirs


def _dtype_of(config: NemotronConfig) -> torch.dtype | None:
    named = getattr(config, "dtype", None)
    return getattr(torch, named, None) if isinstance(named, str) else named
