"""minitron: run, shrink, retrain, evaluate, serve and convert models of the Nemotron-4 / Minitron family.

Importing this package is light: torch and transformers are imported when a name that needs them is first used.
Nothing is changed in transformers until `register()` is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .assets import bundled_model
    from .auto import register
    from .cache import NemotronCache
    from .config import PRESETS, NemotronConfig
    from .heads import (
        NemotronForQuestionAnswering,
        NemotronForSequenceClassification,
        NemotronForTokenClassification,
    )
    from .loading import load
    from .model import NemotronForCausalLM, NemotronModel, NemotronPreTrainedModel
    from .tokenizer import load_tokenizer

# public name -> module of this package that defines it
_LAZY = {
    "PRESETS": "config",
    "NemotronCache": "cache",
    "NemotronConfig": "config",
    "NemotronForCausalLM": "model",
    "NemotronForQuestionAnswering": "heads",
    "NemotronForSequenceClassification": "heads",
    "NemotronForTokenClassification": "heads",
    "NemotronModel": "model",
    "NemotronPreTrainedModel": "model",
    "bundled_model": "assets",
    "load": "loading",
    "load_tokenizer": "tokenizer",
    "register": "auto",
}

__all__ = [
    "PRESETS",
    "NemotronCache",
    "NemotronConfig",
    "NemotronForCausalLM",
    "NemotronForQuestionAnswering",
    "NemotronForSequenceClassification",
    "NemotronForTokenClassification",
    "NemotronModel",
    "NemotronPreTrainedModel",
    "__version__",
    "bundled_model",
    "load",
    "load_tokenizer",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'minitron' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
