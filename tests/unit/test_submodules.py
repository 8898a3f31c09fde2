"""Modules that moved still give their names, with a warning that says where they are now."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "deprecations.md"
MOVED = re.findall(r"^\| module `(minitron\.[\w.]+)` \| `(minitron\.[\w.]+)`", PAGE.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize(("old", "new"), MOVED)
def test_moved_modules_warn_and_give_the_same_objects(old: str, new: str) -> None:
    there = importlib.import_module(new)
    names = [name for name, value in vars(there).items() if getattr(value, "__module__", None) == new]
    assert names
    for name in names:
        with pytest.warns(DeprecationWarning, match=re.escape(f"{old}.{name} has moved: use {new}.{name}")):
            assert getattr(importlib.import_module(old), name) is getattr(there, name)


def test_a_moved_module_has_no_other_names() -> None:
    assert MOVED
    with pytest.raises(AttributeError, match="nothing"):
        importlib.import_module(MOVED[0][0]).nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from minitron.distill.train import nothing  # noqa: F401


def test_names_of_the_data_package_come_from_it() -> None:
    from minitron import data
    from minitron.data import documents, packing, token_cache

    assert data.Source is documents.Source
    assert data.PackedBlocks is packing.PackedBlocks
    assert data.tokenize is token_cache.tokenize


def test_the_language_model_is_still_found_in_the_backbones_module() -> None:
    import minitron
    import minitron.model

    with pytest.warns(DeprecationWarning, match=r"use minitron\.heads\.NemotronForCausalLM"):
        assert minitron.model.NemotronForCausalLM is minitron.NemotronForCausalLM
