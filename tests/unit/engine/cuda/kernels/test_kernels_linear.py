"""Products with and without a norm, for every format, number of rows and odd shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, assert_product, dense, dtype_of_format, matrix_of, normed, numbers, some_norm

from minitron.engine.cuda.kernels import FORMATS, MOST_ROWS
from minitron.engine.cuda.kernels.linear import linear, normalize

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
EPS = 1e-5


@pytest.mark.parametrize(("rows", "norm"), [(1, "layer"), (3, "rms"), (6, "layer"), (MOST_ROWS, "none")])
@pytest.mark.parametrize("format", FORMATS)
def test_a_product_of_normalized_rows(format: str, rows: int, norm: str) -> None:
    outputs, inputs, dtype = 21, 130, dtype_of_format(format)
    x, weights = numbers(rows, inputs) + 1, matrix_of(numbers(outputs, inputs, seed=3), format)
    bias, residual = numbers(outputs, seed=4), numbers(rows, outputs, seed=5)
    given = some_norm(inputs, norm)
    found = linear(x, weights, dtype, norm=given, eps=EPS, bias=bias, residual=residual)
    assert_product(found, normed(x, given, EPS), dense(weights), dtype, bias.expand(rows, -1), residual)


@given(
    rows=st.integers(1, 5),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 150),
    format=st.sampled_from(("fp32", "int8", "int4")),
    norm=st.sampled_from(("none", "layer", "rms")),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_shape(rows: int, outputs: int, inputs: int, format: str, norm: str) -> None:
    """In fp32, so that a wrong index is no rounding error; quantized weights are exact numbers there as well."""
    x, weights = numbers(rows, inputs), matrix_of(numbers(outputs, inputs, seed=3), format)
    given = some_norm(inputs, norm)
    found = linear(x, weights, torch.float32, norm=given, eps=EPS)
    assert_product(found, normed(x, given, EPS), dense(weights), torch.float32)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """But for the size of the tile, which two numbers of rows may share."""
    x, weights = numbers(4, 70), matrix_of(numbers(9, 70, seed=1), "int4")
    given = some_norm(70, "layer")
    all_rows, some = (linear(part, weights, torch.bfloat16, norm=given, eps=EPS) for part in (x, x[1:3].contiguous()))
    assert torch.equal(all_rows[1:3], some)


def test_rows_are_normalized_into_any_dtype() -> None:
    x, given = numbers(3, 1100) * 7 + 3, some_norm(1100, "layer")
    found = normalize(x, given, EPS, torch.float32)
    torch.testing.assert_close(found.double().cpu(), normed(x, given, EPS), rtol=1e-5, atol=1e-5)
    assert normalize(x, given, EPS, torch.bfloat16).dtype == torch.bfloat16


def test_what_the_kernels_do_not_take_is_refused() -> None:
    x = numbers(1, 64)
    with pytest.raises(ValueError, match="weights in bf12 do not run on a GPU; take one of bf16, fp16, fp32, int8"):
        linear(x, matrix_of(numbers(4, 64), "bf12"), torch.bfloat16)
    with pytest.raises(ValueError, match="33 rows in one call; the kernels take 1 to 32"):
        linear(x.expand(33, -1).contiguous(), matrix_of(numbers(4, 64), "fp32"), torch.float32)
