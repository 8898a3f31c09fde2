"""The original code of a forward pass, to notice when somebody has replaced some of it.

The decode engine computes what that code computes. A method or function that was replaced since (`NemotronMLP.forward =
...`, `minitron.model.apply_rotary = ...`, `torch.nn.functional.linear = ...`) means that torch must run the model.
Replacements from before the package was imported, or inside torch, are not noticed.
"""

from __future__ import annotations

import importlib
import sys
from types import FunctionType
from typing import Any

from torch import nn

from .framework import ACT2FN, ALL_ATTENTION_FUNCTIONS

CLASSES: dict[str, type[nn.Module]] = {
    "Linear": nn.Linear,
    "Embedding": nn.Embedding,
    "SiLU": type(ACT2FN["silu"]),
}
"""The classes of the modules of a language model, by name."""

_MATHEMATICS = tuple(f"{__package__}.ops.{name}" for name in ("act", "attention", "autocast", "norm", "rope"))
_OF_TORCH = ("linear", "embedding", "layer_norm", "relu", "silu", "scaled_dot_product_attention")
_INHERITED = ("forward", "__call__", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
_ATTENTIONS = ("eager", "sdpa")

_written: dict[tuple[Any, str], Any] = {}
"""Each function by owner and name, as it was when it was first recorded."""
_attentions: dict[str, Any] = {}


def record(module: str) -> None:
    """Record the present functions of a module, of the modules with its mathematics and of its classes.

    What an earlier call recorded stays: another module's call does not take a replacement for the original.
    """
    for name in (module, *_MATHEMATICS):
        owner = sys.modules.get(name) or importlib.import_module(name)
        for key, value in vars(owner).items():
            if isinstance(value, FunctionType):
                _written.setdefault((owner, key), value)
    found = vars(sys.modules[module])
    package = module.rpartition(".")[0]
    CLASSES.update(
        {
            name: x
            for name, x in found.items()
            if isinstance(x, type) and issubclass(x, nn.Module) and x.__module__.startswith(package)
        }
    )
    for kind in CLASSES.values():
        names = {key for key, value in vars(kind).items() if isinstance(value, FunctionType)}
        names |= {key for key in _INHERITED if hasattr(kind, key)}
        for key in sorted(names):
            _written.setdefault((kind, key), getattr(kind, key))
    for name in _OF_TORCH:
        _written.setdefault((nn.functional, name), getattr(nn.functional, name))
    for name in _ATTENTIONS:
        _attentions.setdefault(name, ALL_ATTENTION_FUNCTIONS.get(name))


def replaced_code() -> str:
    """The name of a function that is no longer the recorded one; empty if there is none."""
    for (owner, name), value in _written.items():
        if getattr(owner, name, None) is not value:
            return f"{owner.__name__}.{name}"
    for name, value in _attentions.items():
        if ALL_ATTENTION_FUNCTIONS.get(name) is not value:
            return f"the attention function {name!r}"
    return ""
