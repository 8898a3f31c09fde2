"""Modules of a package as its attributes, imported on first use: `minitron.prune.importance`."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any


def submodule(package: str, name: str) -> ModuleType:
    """The module `name` of `package`, for the package's `__getattr__` (PEP 562).

    Raises:
        AttributeError: the package has no such module.
    """
    full = f"{package}.{name}"
    if name.startswith("_") or importlib.util.find_spec(full) is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(full)


def moved(old: str, new: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that has moved: its names work for one release, with a warning that names the new
    module.

    Args:
        old: full name of the old module.
        new: full name of the new module.
    """

    def attribute(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(new), name)
        warnings.warn(
            f"{old}.{name} has moved: use {new}.{name}; the old name will be removed in the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return attribute
