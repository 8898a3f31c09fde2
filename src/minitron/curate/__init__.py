"""Curation: raw text in, clean training shards and the evidence out.

Every stage is a function of a batch of texts. `run` puts them into a folder that can be continued after any
interruption, with results that depend neither on the number of workers nor on the order of the input files.
"""

from __future__ import annotations

from types import ModuleType

from ..submodules import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
