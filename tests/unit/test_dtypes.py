"""Names of dtypes."""

from __future__ import annotations

import pytest
import torch

from minitron.dtypes import LONG_NAMES, dtype_name, long_name, parse_dtype, short_name
from minitron.prune.search import Machine, SearchError
from minitron.train.schedule import TrainConfig


@pytest.mark.parametrize("name", ["bf16", "BF16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_every_spelling_means_the_same(name: str | torch.dtype) -> None:
    assert parse_dtype(name) is torch.bfloat16


def test_names_and_dtypes_go_both_ways() -> None:
    assert {dtype_name(getattr(torch, long)): long for long in LONG_NAMES.values()} == LONG_NAMES
    assert dtype_name(torch.int8) is None
    assert parse_dtype("auto") is None


@pytest.mark.parametrize("name", ["fp8", "int8", "float64", "", torch.int32])
def test_others_are_refused(name: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"--dtype is .*; it must be auto, bf16, fp16, fp32"):
        parse_dtype(name, "--dtype")


@pytest.mark.parametrize("name", ["bf16", "BF16", "bfloat16", "torch.bfloat16"])
def test_options_that_take_a_dtype_take_all_of_its_names(name: str) -> None:
    assert short_name(name) == "bf16"
    assert long_name(name) == "bfloat16"
    assert TrainConfig(steps=1, dtype=name).dtype == "bfloat16"  # type: ignore[arg-type]
    assert Machine(name).dtype == "bf16"


def test_options_refuse_other_names_as_they_were_given() -> None:
    assert [short_name(n) for n in ("int8", "auto", "INT4")] == ["int8", "auto", "INT4"]
    with pytest.raises(ValueError, match="dtype is 'fp16'; it must be auto, bfloat16 or float32"):
        TrainConfig(steps=1, dtype="fp16")  # type: ignore[arg-type]
    with pytest.raises(SearchError, match="dtype is 'fp8'; it must be"):
        Machine("fp8")
