"""Checks of `rope_parameters`, before transformers computes with them.

Each type of RoPE needs numbers of its own. transformers checks few of them, and fails inside a tensor operation or
computes frequencies that are NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST = 1e9
"""Larger numbers overflow in fp32."""


def check_rope(rope: Mapping[str, Any], head_dim: int) -> None:
    """Refuse parameters that a type of RoPE cannot work with; unknown types are left to the model.

    Args:
        rope: `rope_parameters` of a configuration, complete.
        head_dim: width of a head.

    Raises:
        ValueError: names the field, its value, and what would be right.
    """
    kind = rope["rope_type"]
    if not isinstance(kind, str | None):
        raise ValueError(f"rope_parameters: rope_type is {kind!r}; it must be a name")
    _number(rope, "factor", low=1)
    _number(rope, "attention_factor", above=0)
    width = int(head_dim * rope["partial_rotary_factor"])
    if kind == "yarn":
        _check_yarn(rope, head_dim, width)
    elif kind == "llama3":
        _number(rope, "low_freq_factor", above=0)
        _number(rope, "high_freq_factor", above=rope.get("low_freq_factor", 0), than="low_freq_factor")
        _length(rope)
    elif kind == "longrope":
        _length(rope)
        for name in ("short_factor", "long_factor"):
            _check_factors(rope, name, -(-width // 2))


def _check_yarn(rope: Mapping[str, Any], head_dim: int, width: int) -> None:
    if width % 2:
        raise ValueError(
            f"head_dim {head_dim} with partial_rotary_factor {rope['partial_rotary_factor']} rotates {width} channels; "
            f"rope_type 'yarn' needs an even number of them"
        )
    if rope["rope_theta"] <= 1:  # its logarithm is a divisor
        raise ValueError(f"rope_theta is {rope['rope_theta']}; rope_type 'yarn' needs a base greater than 1")
    for name in ("beta_fast", "beta_slow"):
        _number(rope, name, above=0)
    for name in ("mscale", "mscale_all_dim"):
        _number(rope, name, low=0)
    _length(rope)


def _length(rope: Mapping[str, Any]) -> None:
    name = "original_max_position_embeddings"
    value = rope.get(name, 2)
    # Its logarithm is a divisor.
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise ValueError(f"rope_parameters: {name} is {value!r}; it must be a whole number of at least 2")


def _check_factors(rope: Mapping[str, Any], name: str, count: int) -> None:
    values = rope.get(name, [1.0] * count)
    good = isinstance(values, list | tuple) and all(_is_number(value) and value > 0 for value in values)
    if not good or len(values) != count:
        shown = f"has {len(values)} values" if good else f"is {values!r:.60}"
        raise ValueError(
            f"rope_parameters: {name} {shown}; it must be a list of {count} numbers above 0, one for each pair of "
            f"rotated channels"
        )


def _number(
    rope: Mapping[str, Any], name: str, low: float | None = None, above: float | None = None, than: str | None = None
) -> None:
    value = rope.get(name)
    if value is None or (_is_number(value) and (value >= low if low is not None else value > above)):
        return
    right = f"of at least {low}" if low is not None else f"greater than {f'{than} ({above})' if than else above}"
    raise ValueError(f"rope_parameters: {name} is {value!r}; it must be a number {right} and at most {_MOST:g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST
