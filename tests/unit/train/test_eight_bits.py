"""8-bit averages through the form of a checkpoint of several processes; `tests/dist` has the processes."""

from __future__ import annotations

import pytest
import torch

from minitron.train.eight_bits import fill, levels

pytest.importorskip("torchao")
from torchao.optim.subclass_8bit import OptimState8bit


def average(signed: bool, rows: int = 16) -> OptimState8bit:
    made = OptimState8bit.zeros((rows, 128), signed, device="cpu", dtype=torch.float32)
    numbers = torch.randn(rows, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, rows)[:, None]
    made.copy_(numbers if signed else numbers.square())
    return made


def spread(value: OptimState8bit) -> torch.Tensor:
    return value.scale.repeat_interleave(value.block_size).view(value.shape)


@pytest.mark.parametrize("signed", [True, False])
def test_the_same_blocks_come_back_bit_for_bit(signed: bool) -> None:
    value, again = average(signed), OptimState8bit.zeros((16, 128), signed, device="cpu")
    fill(again, value.codes, spread(value), signed)
    assert torch.equal(again.codes, value.codes)
    assert torch.equal(again.scale, value.scale)


@pytest.mark.parametrize("signed", [True, False])
def test_other_blocks_are_quantized_again(signed: bool) -> None:
    """One row less at the top, so that each block has rows of two old ones."""
    value, again = average(signed), OptimState8bit.zeros((14, 128), signed, device="cpu")
    fill(again, value.codes[1:15], spread(value)[1:15], signed)
    expected, scale = value.dequantize()[1:15], again.scale.repeat_interleave(256).view(14, 128)
    assert ((again.dequantize() - expected).abs() <= 0.016 * scale).all()


def test_plain_numbers_are_scales_of_one() -> None:
    numbers = torch.randn(3, 5)
    plain = torch.zeros(3, 5)
    fill(plain, torch.full((3, 5), 255, dtype=torch.uint8), numbers, True)
    assert torch.equal(plain, numbers)
    assert levels(True, torch.device("cpu"))[-1] == levels(False, torch.device("cpu"))[-1] == 1


def test_a_block_of_plain_numbers_that_are_equal() -> None:
    """Which has one scale, and is not one that was quantized before."""
    for number in (0.0, 2.5, -2.5):
        again = OptimState8bit.zeros((2, 128), True, device="cpu")
        fill(again, torch.full((2, 128), 255, dtype=torch.uint8), torch.full((2, 128), number), True)
        torch.testing.assert_close(again.dequantize(), torch.full((2, 128), number), rtol=0.01, atol=0)
