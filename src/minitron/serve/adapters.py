"""LoRA adapters over a base model whose weights they share: the low-rank product is added in the forward pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.detect import detect
from ..checkpoint.lora import LowRank
from ..locate import fetch, locate


class AdaptedLinear(nn.Module):
    """A linear module plus a low-rank product, computed as peft computes it before merging."""

    def __init__(self, linear: nn.Module, part: LowRank) -> None:
        super().__init__()
        self.linear, self.scale = linear, part.scale
        device: Any = linear.weight.device
        self.register_buffer("down", part.down.to(device), persistent=False)
        self.register_buffer("up", part.up.to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., outputs) of x (..., inputs)."""
        out = self.linear(x)
        down: Any = self.down
        up: Any = self.up
        return (out + F.linear(F.linear(x.to(down.dtype), down), up) * self.scale).to(out.dtype)


def with_adapter(model: Any, parts: Sequence[LowRank]) -> Any:
    """A model with an adapter, over the weights of `model`, which stays as it is.

    Raises:
        ValueError: an adapted module is not linear.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    adapted = copy.deepcopy(model, shared)
    for part in parts:
        linear = adapted.get_submodule(part.module)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{part.module} is a {type(linear).__name__}; only linear modules are adapted unmerged")
        adapted.set_submodule(part.module, AdaptedLinear(linear, part))
    return adapted.eval()


def adapter_folder(path: str) -> Path | None:
    """The folder of a LoRA adapter; None if the checkpoint is anything else."""
    found = locate(path)
    folder = found if isinstance(found, Path) else fetch(found)
    return folder if detect(folder) == "lora" else None
