"""The classes of the architectures in `families`: transformers' own, with this package's `generate`.

Nemotron's are in `model` and `heads`. A class made here computes what transformers computes, has the name that
`config.json` calls `architectures`, and leaves the loop over tokens to the engine where that can serve.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any, TypeGuard

from transformers import PreTrainedConfig, PreTrainedModel

from . import heads, model
from .engine_hook import EngineDecoding
from .families import FAMILIES, Family, family_of
from .shapes import describe
from .written_code import record


@cache
def causal_lm_class(family: Family) -> type[Any]:
    """The causal language model of a family, whose `generate` is `EngineDecoding.generate`."""
    own = getattr(heads, family.architecture, None)
    if own is not None:
        return own
    module = _module(family)
    upstream = getattr(module, family.architecture)
    record(module.__name__)
    doc = f"transformers' {family.architecture} with the `generate` of this package."
    return type(family.architecture, (EngineDecoding, upstream), {"__module__": __name__, "__doc__": doc})


def rotary_of(config: PreTrainedConfig) -> Any:
    """The rotary embedding of a new model: a module with `inv_freq` (R / 2,) fp32 and `attention_scaling`."""
    family = family_of(config)
    return getattr(_module(family), f"{class_prefix(family)}RotaryEmbedding")(config)


def decoder_layer(config: PreTrainedConfig, index: int) -> Any:
    """A new decoder layer, which is called with hidden states, `attention_mask` and `position_embeddings`."""
    family = family_of(config)
    return getattr(_module(family), f"{class_prefix(family)}DecoderLayer")(config, index)


def final_norm(config: PreTrainedConfig) -> Any:
    """A new norm of the residual stream."""
    shape = describe(config)
    suffix = {"layernorm1p": "LayerNorm1P", "rmsnorm": "RMSNorm"}[shape.family.norm.kind]
    kind = getattr(_module(shape.family), class_prefix(shape.family) + suffix)
    return kind(shape.hidden, eps=shape.norm_eps)


def class_prefix(family: Family) -> str:
    """What the names of all classes of an architecture begin with, such as "Qwen2"."""
    return family.architecture.removesuffix("ForCausalLM")


def engine_decodes(candidate: object) -> TypeGuard[PreTrainedModel]:
    """Whether a model is one whose `generate` may run in the engine."""
    return isinstance(candidate, EngineDecoding) and isinstance(candidate, PreTrainedModel)


def _module(family: Family) -> ModuleType:
    """The module that spells a family's classes."""
    if hasattr(heads, family.architecture):
        return model
    return importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")


def __getattr__(name: str) -> Any:
    """Classes by their names, which is how pickle finds them."""
    family = next((family for family in FAMILIES.values() if family.architecture == name), None)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return causal_lm_class(family)
