"""Names of dtypes."""

from __future__ import annotations

import pytest
import torch

from minitron.dtypes import DTYPES, dtype_name, parse_dtype


@pytest.mark.parametrize("name", ["bf16", "BF16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_every_spelling_means_the_same(name: str | torch.dtype) -> None:
    assert parse_dtype(name) is torch.bfloat16


def test_names_and_dtypes_go_both_ways() -> None:
    assert {dtype_name(dtype): dtype for dtype in DTYPES.values()} == DTYPES
    assert dtype_name(torch.int8) is None
    assert parse_dtype("auto") is None


@pytest.mark.parametrize("name", ["fp8", "int8", "float64", "", torch.int32])
def test_others_are_refused(name: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"--dtype is .*; it must be auto, bf16, fp16, fp32"):
        parse_dtype(name, "--dtype")
