"""Options whose types are built when a value is given, not when a verb is.

typer checks values by pydantic, whose import takes a third of the time of a verb's `--help`, which checks none.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_NAME = "typer._adapters"
"""The module of typer that builds an option's type, and imports pydantic; releases before 0.29 have none."""


class _Type:
    """In place of pydantic's `TypeAdapter` of one option."""

    def __init__(self, *described: Any, **options: Any) -> None:
        self._described, self._options = described, options
        self._built: Any = None

    def validate_python(self, *values: Any, **options: Any) -> Any:
        """As of `TypeAdapter`."""
        if self._built is None:
            self._built = _real().try_build_adapter(*self._described, **self._options)
        return self._built.validate_python(*values, **options)


class _Adapters(ModuleType):
    """In place of typer's module, which is imported as soon as anything else of it is asked for."""

    try_build_adapter = _Type

    def __getattr__(self, name: str) -> Any:
        return getattr(_real(), name)


def _real() -> Any:
    found = sys.modules.get(_NAME)
    if isinstance(found, _Adapters):
        del sys.modules[_NAME]
        found = importlib.import_module(_NAME)
    return found


def build_types_when_used() -> None:
    """Let typer build types when values are given. Without effect where typer has built some already."""
    sys.modules.setdefault(_NAME, _Adapters(_NAME))
