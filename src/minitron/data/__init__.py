"""Texts for training and measuring: documents from files, tokens of them, packed blocks, batches in order.

Its classes and functions can be had from here: `from minitron.data import PackedBlocks, Source, tokenize`.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..submodules import submodule

_HOME = {
    "documents": ("BadTextError", "DataError", "Source", "read_documents", "read_texts"),
    "packing": ("Batch", "BlockStream", "PackedBlocks", "collate", "split_documents"),
    "token_cache": ("Encoder", "TokenCache", "TokenFolder", "open_cache", "tokenize", "tokenize_all"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    return submodule(__name__, name)
