"""minitron: run, shrink, retrain, evaluate and convert models of the Nemotron-4 / Minitron family.

Importing this package is light: torch and transformers are imported when a name that needs them is first used. Its
modules need no import of their own: `minitron.prune.importance` is there after `import minitron`.
Nothing is changed in transformers until `register()` is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .quiet import drop_import_messages
from .submodules import submodule
from .version import __version__

if TYPE_CHECKING:
    from . import bench, checkpoint, compress, data, distill, engine, evaluate, ops, prune, report, train
    from .assets import bundled_model
    from .cache import NemotronCache
    from .config import NemotronConfig
    from .distill.losses import DistillLoss
    from .heads import (
        NemotronForCausalLM,
        NemotronForQuestionAnswering,
        NemotronForSequenceClassification,
        NemotronForTokenClassification,
    )
    from .loading import load
    from .model import NemotronModel, NemotronPreTrainedModel
    from .presets import PRESETS
    from .registration import register
    from .tokenizer import load_tokenizer

drop_import_messages()

# public name -> module of this package that defines it
_LAZY = {
    "DistillLoss": "distill.losses",
    "PRESETS": "presets",
    "NemotronCache": "cache",
    "NemotronConfig": "config",
    "NemotronForCausalLM": "heads",
    "NemotronForQuestionAnswering": "heads",
    "NemotronForSequenceClassification": "heads",
    "NemotronForTokenClassification": "heads",
    "NemotronModel": "model",
    "NemotronPreTrainedModel": "model",
    "bundled_model": "assets",
    "load": "loading",
    "load_tokenizer": "tokenizer",
    "register": "registration",
}

__all__ = [
    "PRESETS",
    "DistillLoss",
    "NemotronCache",
    "NemotronConfig",
    "NemotronForCausalLM",
    "NemotronForQuestionAnswering",
    "NemotronForSequenceClassification",
    "NemotronForTokenClassification",
    "NemotronModel",
    "NemotronPreTrainedModel",
    "__version__",
    "bench",
    "bundled_model",
    "checkpoint",
    "compress",
    "data",
    "distill",
    "engine",
    "evaluate",
    "load",
    "load_tokenizer",
    "ops",
    "prune",
    "register",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    try:
        return submodule(__name__, name)
    except AttributeError as error:
        raise AttributeError(f"{error}; it has: {', '.join(__all__)}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
