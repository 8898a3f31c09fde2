"""Pure tensor functions. They know shapes and dtypes, and nothing of models, files or tokenizers."""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
