"""Calibration on several processes: each takes a share of the blocks, and all get the sum.

Without torch.distributed there is one rank, which takes everything.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..data.packing import Batch
from .streaming import StreamError

T = TypeVar("T")


def place() -> tuple[int, int]:
    """(rank, number of ranks)."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def share(blocks: Batch) -> Batch:
    """This rank's blocks: every n-th.

    Raises:
        StreamError: there are fewer blocks than ranks.
    """
    rank, ranks = place()
    if ranks == 1:
        return blocks
    if len(blocks.input_ids) < ranks:
        raise StreamError(f"{len(blocks.input_ids)} calibration blocks for {ranks} ranks; each needs one at least")
    parts = (tensor[rank::ranks] for tensor in (blocks.input_ids, blocks.position_ids, blocks.labels))
    return Batch(*parts, num_items=blocks.num_items)


def own_folder(folder: Path | None) -> Path | None:
    """A folder of this rank's own inside `folder`, where there are several."""
    rank, ranks = place()
    return folder if folder is None or ranks == 1 else folder / f"rank-{rank}-of-{ranks}"


def gather(mine: T) -> list[T]:
    """What all ranks have, in the order of the ranks, on each of them."""
    _, ranks = place()
    if ranks == 1:
        return [mine]
    parts: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(parts, mine)
    return parts


def add_up(parts: Sequence[Any]) -> Any:
    """Their sum, in order, so that each rank computes the same."""
    return functools.reduce(operator.add, parts)
