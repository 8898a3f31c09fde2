"""Everything that this package uses of transformers and that its documentation does not promise.

A release may rename or change any of it. Each entry has a test in `tests/unit/test_framework.py`, and no other file
imports such a name. `TESTED` lists the releases that all of it was tested with; on another one the
first `generate` checks the release (`release_check`) before it serves.

Names that transformers looks up on our classes are not listed here, because a class attribute has no import:
`_no_split_modules`, `_supports_...`, `_can_record_outputs`, `_tp_plan`, `_pp_plan` and the like, and the methods that
`generate` calls: `_sample` and `_assisted_decoding` (see `engine_hook`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import transformers
from torch import Tensor
from transformers import initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .tested import TRANSFORMERS as TESTED

__all__ = [
    "ACT2FN",
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "CACHE_NAME",
    "CACHE_NAMES",
    "ROPE_INIT_FUNCTIONS",
    "TESTED",
    "GradientCheckpointingLayer",
    "can_return_tuple",
    "capture_outputs",
    "dynamic_rope_update",
    "framework_mask",
    "given_cache",
    "initialization",
    "installed",
    "merge_with_config_defaults",
    "method_of_generation",
    "refuse_stray_caches",
    "sdpa_attention_forward",
    "sdpa_mask",
    "update_cache",
    "with_framework_name",
]

CACHE_NAMES = ("past_key_values", "cache")
"""The argument that holds the cache: until 5.23, and from 5.24 on. Both names work with every release."""

CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})
"""The one that the installed release uses: for arguments of `forward` and of layers, and for the field of outputs."""

_MASK_CACHE_NAME = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)


def installed() -> str:
    """The version of transformers that is in use."""
    return transformers.__version__


def given_cache(past_key_values: Any, kwargs: dict[str, Any]) -> Any:
    """The cache of a call, under either of its two names. Removes it from `kwargs`.

    Where the release's own name is `past_key_values`, continuous batching passes its paged cache as `cache`, for the
    attention function: that one stays.

    Raises:
        ValueError: two different caches.
    """
    other = kwargs.get("cache")
    if other is None:
        kwargs.pop("cache", None)
        return past_key_values
    if CACHE_NAME != "cache" and not isinstance(other, Cache | tuple | list):
        return past_key_values
    if past_key_values is not None and past_key_values is not other:
        raise ValueError("past_key_values and cache are two names of one argument, and two different caches were given")
    return kwargs.pop("cache")


def with_framework_name(kwargs: Mapping[str, Any], name: str = CACHE_NAME) -> dict[str, Any]:
    """The arguments with the cache, if there is one, under the release's own name (or another `name`)."""
    renamed = dict(kwargs)
    cache = given_cache(renamed.pop("past_key_values", None), renamed)
    if cache is not None:
        renamed[name] = cache
    return renamed


def refuse_stray_caches(kwargs: Mapping[str, Any]) -> None:
    """Refuse a cache under a name that this package does not read: without it the text would be wrong.

    Raises:
        ValueError: names the argument and the versions.
    """
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise ValueError(
                f"argument {name!r} holds a {type(value).__name__}, and caches are taken as "
                f"{' or '.join(map(repr, CACHE_NAMES))}. transformers {installed()} is installed; "
                f"minitron was tested with {', '.join(TESTED)}"
            )


def update_cache(cache: Any, key: Tensor, value: Tensor, layer: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Append keys and values (B, K, T, H) of a layer; returns all of that layer, (B, K, S, H).

    The paged cache of continuous batching also reads the arguments of the attention function, and changes them.
    """
    if isinstance(cache, Cache):
        return cache.update(key, value, layer)
    return cache.update(key, value, layer, kwargs=kwargs)


def framework_mask(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Any,
    cache: Any,
    position_ids: Tensor | None,
    and_mask_function: Callable | None = None,
) -> Any:
    """transformers' causal mask in the form that the attention implementation of `config` takes; None if it needs none.

    Args:
        inputs_embeds: (B, T, D), of which the shape, dtype and device are read.
        attention_mask: (B, S) or None; a 4-D mask comes back as it is.
        position_ids: (B or 1, T). With neither mask nor cache, a position that is not one more than the position
            before it begins another document, to which earlier ones are hidden.
        and_mask_function: `(batch, head, query, key) -> bool`; hides what it is false for.
    """
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        and_mask_function=and_mask_function,
        **{_MASK_CACHE_NAME: cache},
    )


def method_of_generation(name: str) -> Any:
    """A method of `GenerationMixin`, as the function that its class holds."""
    return getattr(GenerationMixin, name)
