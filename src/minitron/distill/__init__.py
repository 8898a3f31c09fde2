"""Distillation on top of the training loop: losses, targets, caches of teacher outputs, correction of the teacher."""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
