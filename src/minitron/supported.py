"""What a `config.json` must not ask for: architectures that `families` does not describe, refused with a sentence.

Values are those of the file, before any configuration is built from them. A model that passes is dense and its layers
are alike; `shapes.describe` checks the rest on the configuration, with the defaults of transformers filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .families import FAMILIES, SUPPORTED, Family

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
_MAMBA = ("hybrid_override_pattern", "mamba_num_heads", "mamba_d_state", "ssm_state_size", "state_size", "ssm_cfg")
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    "max_position_embeddings",
)
_UNEVEN = ("block_configs", "per_layer_config", "no_rope_layers")


def check_supported(values: Mapping[str, Any]) -> Family:
    """The family of a configuration as it stands in a file.

    Args:
        values: the keys of `config.json`.

    Raises:
        ValueError: another architecture; experts; Mamba layers; layers that differ; sizes that are not positive. The
            message names the field, its value and what would be right.
    """
    kind = values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    reason = _another_kind(values)
    if family is None or reason:
        named = f"model_type is {kind!r:.80}" + (f", {reason}" if reason else "")
        raise ValueError(f"{named}; the architectures that minitron works with are dense ones: {SUPPORTED}")
    _check_layers_are_alike(values)
    for name in _SIZES:
        size = values.get(name)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{name} is {size}; it must be a whole number of at least 1")
    _check_heads(values)
    return family


def _another_kind(values: Mapping[str, Any]) -> str:
    """What the model has that no dense transformer has, as a clause; empty if nothing."""
    for name in _EXPERTS:
        count = values.get(name)
        if isinstance(count, int) and count > 1:
            return f"a mixture of experts ({name} is {count})"
    found = next((name for name in _MAMBA if values.get(name) is not None), None)
    return f"with Mamba layers ({found} is {values[found]!r:.40})" if found else ""


def _check_layers_are_alike(values: Mapping[str, Any]) -> None:
    found = next((name for name in (*_UNEVEN, *_SIZES) if isinstance(values.get(name), list | dict)), None)
    if found:
        raise ValueError(
            f"{found} is {values[found]!r:.60}: layers of different shapes, as a search over blocks makes them; "
            f"minitron works with models whose layers are alike"
        )


def _check_heads(values: Mapping[str, Any]) -> None:
    heads, groups = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups:
        raise ValueError(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups}); each key/value head "
            f"serves the same number of query heads"
        )
