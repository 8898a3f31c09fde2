"""Modules of a package as its attributes, imported when they are first named: `minitron.prune.importance`."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


def submodule(package: str, name: str) -> ModuleType:
    """The module `name` of `package`, for the package's `__getattr__` (PEP 562).

    Raises:
        AttributeError: the package has no such module.
    """
    full = f"{package}.{name}"
    if name.startswith("_") or importlib.util.find_spec(full) is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(full)
