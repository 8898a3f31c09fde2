"""Plain values, as YAML and JSON give them, as the dataclass that says what they may be."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

from ..characters import require_characters
from .limits import shown


class FieldError(ValueError):
    """A value that a field cannot have; the message names the field and what would be right."""


def fill(kind: Any, values: Any, where: str = "") -> Any:
    """A dataclass of plain values, checked field by field; its fields may be dataclasses, tuples, literals and None.

    Args:
        kind: the dataclass.
        values: a mapping of names of fields to values.
        where: what messages write in front of a field.

    Raises:
        FieldError: an unknown or missing field, or a value of another kind.
    """
    if not isinstance(values, dict):
        raise FieldError(f"{where or 'recipe'}: expected fields and values, found {shown(values)}")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; expected some of {', '.join(hints)}"
            raise FieldError(f"{where}{str(name)[:80]}: no such field{hint}")
    made = {name: _value(hints[name], value, f"{where}{name}") for name, value in values.items()}
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in made]
    if missing:
        raise FieldError(f"{where}{missing[0]}: is missing")
    return kind(**made)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that a field asks for."""
    if dataclasses.is_dataclass(hint):
        return fill(hint, value, f"{where}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise FieldError(f"{where} is {shown(value)}; expected a list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        if len(kinds) != len(value):
            raise FieldError(f"{where} is {shown(value)}; expected a list of {len(kinds)}")
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is Literal:
        if value not in arguments:
            raise FieldError(f"{where} is {shown(value)}; expected one of {', '.join(map(repr, arguments))}")
        return value
    return _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4 as text: it wants a dot
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise FieldError(f"{where} is {shown(value)}; expected a finite number")
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and hint is str:
        try:
            return require_characters(value, where)
        except ValueError as error:
            raise FieldError(str(error)) from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise FieldError(f"{where} is {shown(value)}; expected {names.get(hint, hint.__name__)}")
    return value
