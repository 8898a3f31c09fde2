"""Evaluation: scores of texts and tasks, one model or several side by side."""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
