"""The MLP: the list of active neurons, the rows of `down_proj` that are read, and the gated kind."""

from __future__ import annotations

import pytest
import torch
from active_neurons import compacted
from kernel_cases import DEVICE, assert_product, dense, dtype_of_format, matrix_of, normed, numbers, some_norm
from torch.nn import functional as F

from minitron.engine.cuda.kernels import FORMATS, mlp
from minitron.engine.cuda.kernels.mlp import down_active, gated_silu, up_squared_relu
from minitron.engine.matrix import Matrix

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
EPS = 1e-5


def silenced(neurons: int, share: float) -> torch.Tensor:
    """A bias that makes a share of the neurons zero and the others positive."""
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(7))
    bias = torch.full((neurons,), 20.0)
    bias[order[: round(share * neurons)]] = -1e3
    return bias.to(DEVICE)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("format", "rows"), [("bf16", 1), ("int8", 5), ("int4", 1)])
def test_zero_neurons_are_skipped(format: str, rows: int, share: float) -> None:
    """Rows of `down_proj` that belong to zero neurons hold NaN here: reading one would show."""
    channels, neurons, dtype = 70, 43, dtype_of_format(format)
    x, given, bias = numbers(rows, channels), some_norm(channels, "layer"), silenced(neurons, share)
    up, down = (matrix_of(numbers(neurons, channels, seed=seed) * 0.1, format) for seed in (3, 4))
    values, index, counts = up_squared_relu(x, up, dtype, norm=given, eps=EPS, bias=bias)

    expected = (normed(x, given, EPS) @ dense(up).T + bias.double().cpu()).relu().square()
    torch.testing.assert_close(values.double().cpu(), expected, rtol=0.05 if dtype != torch.float32 else 1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip((index, counts), compacted(values, index.shape[1]), strict=True))
    assert int(counts.sum()) == neurons - round(share * neurons)

    listed = dense(down)
    silent = (values == 0).all(0)
    if format in ("bf16", "fp16", "fp32"):
        down.data[silent] = torch.nan
    else:
        down.data[silent] = 255  # the scales as well: NaN
    residual, offset = numbers(rows, channels, seed=5), numbers(channels, seed=6)
    found = down_active(values, index, counts, down, dtype, bias=offset, residual=residual)
    assert_product(found, values.double().cpu(), listed.T, dtype, offset.expand(rows, -1), residual)


def test_the_sum_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "BLOCKS_AT_ONCE", 4)
    x, up = numbers(1, 64), matrix_of(numbers(70, 64, seed=1), "fp32")
    down = matrix_of(numbers(70, 64, seed=2), "fp32")
    first, second = (down_active(*up_squared_relu(x, up, torch.float32), down, torch.float32) for _ in range(2))
    assert torch.equal(first, second)


def test_more_blocks_than_one_program_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "BLOCKS_AT_ONCE", 4)
    channels, neurons = 40, 70
    x, up = numbers(1, channels), matrix_of(numbers(neurons, channels, seed=1), "fp32")
    down = matrix_of(numbers(neurons, channels, seed=2), "fp32")
    values, index, counts = up_squared_relu(x, up, torch.float32)
    found = down_active(values, index, counts, down, torch.float32)
    assert_product(found, values.double().cpu(), dense(down).T, torch.float32)


@pytest.mark.parametrize("rows", [1, 2])
def test_nan_is_not_a_zero(rows: int) -> None:
    up = matrix_of(numbers(20, 32), "fp32")
    up.data[3] = torch.nan
    values, index, counts = up_squared_relu(numbers(rows, 32, seed=1), up, torch.float32)
    assert values[:, 3].isnan().all()
    assert down_active(values, index, counts, matrix_of(numbers(20, 32, seed=2), "fp32"), torch.float32).isnan().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_gated_mlp(format: str, rows: int) -> None:
    channels, neurons, dtype = 72, 25, dtype_of_format(format)
    x, given = numbers(rows, channels), some_norm(channels, "rms")
    gate, up = (matrix_of(numbers(neurons, channels, seed=seed) * 0.2, format) for seed in (3, 4))
    a, b = numbers(neurons, seed=5), numbers(neurons, seed=6)
    found = gated_silu(x, gate, up, dtype, norm=given, eps=EPS, gate_bias=a, up_bias=b)
    rounded = normed(x, given, EPS)
    expected = F.silu(rounded @ dense(gate).T + a.double().cpu()) * (rounded @ dense(up).T + b.double().cpu())
    assert found.dtype == dtype
    share = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.double().cpu(), expected, rtol=share, atol=share)


def test_the_bytes_of_a_quantized_row_that_pads_it_are_not_read_as_weights() -> None:
    padded = matrix_of(numbers(9, 65), "int8")
    other = Matrix(padded.format, padded.shape, padded.data.clone())
    other.data[:, 65:128] = 77  # codes of columns that do not exist
    x = numbers(1, 65, seed=1)
    one, two = (up_squared_relu(x, each, torch.float32)[0] for each in (padded, other))
    assert torch.equal(one, two)
