"""8-bit averages of sharded parameters as tensors that any number of processes can read.

torchao keeps a code for each number and a scale for each block of 256 numbers of a process's own part, so where blocks
begin depends on the number of processes. A checkpoint has a code and a scale for each number instead, both of the
parameter's shape and sharded as it is. Where a process finds whole blocks of one scale again, as all do in a run that
continues in as many processes, the average is what it was, bit for bit; elsewhere it is quantized anew. Averages that
torchao keeps in fp32, because they are small, are stored as the scale of the code that means 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

CODES, SCALES = "codes", "scales"


def levels(signed: bool, device: torch.device) -> Tensor:
    """The numbers (256,) fp32 that codes stand for, in rising order; the last is 1."""
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit.zeros((256,), signed, device=device).qmap


def to_parts(value: DTensor) -> dict[str, Tensor]:
    """Codes (uint8) and scales (fp32) of a sharded average, each of its shape, on the CPU: they are larger than it."""
    local: Any = value.to_local()
    if hasattr(local, CODES):
        parts = {CODES: local.codes, SCALES: local.scale.repeat_interleave(local.block_size).view(local.codes.shape)}
    else:
        parts = {CODES: torch.full_like(local, 255, dtype=torch.uint8), SCALES: local}
    return {name: _sharded_as(value, part).cpu() for name, part in parts.items()}


def _sharded_as(value: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def fill(average: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None:
    """Write what `to_parts` returned into an average, sharded or not: 8-bit blocks, or plain fp32.

    Args:
        average: of torchao's optimizer.
        codes, scales: of its shape, sharded as it is.
        signed: whether the average has negative numbers.
    """
    target: Any
    target, codes, scales = (x.to_local() if isinstance(x, DTensor) else x for x in (average, codes, scales))
    numbers = levels(signed, codes.device)[codes.long()] * scales
    if not hasattr(target, CODES):
        target.copy_(numbers)
        return
    target.copy_(numbers)  # torchao's own quantization
    blocks, block_codes = scales.reshape(-1, target.block_size), codes.reshape(-1, target.block_size)
    # A block of plain numbers has one scale only where all of them are equal, and is then right in either form.
    whole = (blocks == blocks[:, :1]).all(1) & (blocks[:, 0] >= 0)
    target.scale.copy_(torch.where(whole, blocks[:, 0], target.scale))
    kept = torch.where(whole[:, None], block_codes, target.codes.reshape(-1, target.block_size))
    target.codes.copy_(kept.view(target.codes.shape))
