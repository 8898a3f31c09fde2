"""Checkpoints on disk: Hugging Face folders, NeMo / Megatron, GGUF. Bytes to named tensors and back, never a model.

Every reader returns a `Checkpoint` of lazy tensors under Hugging Face names, every writer takes one; a tensor is read
a block of rows at a time, so the memory needed does not grow with the model.
"""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
