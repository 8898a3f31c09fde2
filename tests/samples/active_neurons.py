"""Lists of active neurons in plain torch, which the kernels' lists must equal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def compacted(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The neurons of activations (M, F) that are not zero in every row, block by block and in rising order.

    Returns:
        index (ceil(F / block), block) int32, of which the first counts[b] in row b are valid and the others are -1;
        counts (ceil(F / block),) int32.
    """
    active = F.pad((values != 0).any(0), (0, -values.shape[1] % block)).view(-1, block)
    neurons = torch.arange(active.numel(), dtype=torch.int32, device=values.device).view_as(active)
    counts = active.sum(-1, dtype=torch.int32)
    order = active.byte().argsort(dim=-1, descending=True, stable=True)
    valid = torch.arange(block, device=values.device) < counts[:, None]
    return torch.where(valid, neurons.gather(1, order), -1), counts
