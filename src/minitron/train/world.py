"""The processes of a run: how many there are, which one this is, and what they agree on."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

# Between two exchanges the first process may write a checkpoint of many gigabytes.
_PATIENCE = datetime.timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """Processes that share a run; one alone by default. Small numbers are exchanged between the CPUs."""

    mesh: DeviceMesh | None = None
    """(data, tensor): processes along `data` have different sequences, those along `tensor` parts of each matrix."""

    @property
    def rank(self) -> int:
        """Which share of the data this process has, from 0."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("data")

    @property
    def size(self) -> int:
        """Into how many shares the data is split."""
        return 1 if self.mesh is None else self.mesh.size(0)

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.mesh is None or dist.get_rank() == 0

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the shares of the data; all processes must name the same ones."""
        if self.mesh is None or self.size == 1:
            return dict(values)
        names = sorted(values)
        total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
        dist.all_reduce(total, group=self.mesh.get_group("data"))
        return dict(zip(names, total.tolist(), strict=True))

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        if self.mesh is None:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def agree(self, value: Any) -> Any:
        """What the first process says."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process says, in their order."""
        if self.mesh is None:
            return [value]
        box: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(box, value)
        return box

    def first_does(self, action: Callable[[], T]) -> T:
        """Let the first process do something while the others wait; its result, or its error, in all of them.

        Without this an error of one process leaves the others waiting for an hour.
        """
        if self.mesh is None:
            return action()
        result: Any = None
        error: Exception | None = None
        if self.first:
            try:
                result = action()
            except Exception as problem:
                error = problem
        result, message, kind = self.agree((result, str(error), type(error) if error else None))
        if error is not None:
            raise error
        if kind is not None:
            raise (kind if issubclass(kind, ValueError) else OSError)(message)
        return result

    def first_then_all(self, action: Callable[[], T]) -> T:
        """Let the first process do something, then the others, who find its work on the disk; the result of each."""
        box: list[T] = []

        def once() -> None:
            box.append(action())

        self.first_does(once)
        return box[0] if box else action()


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process among several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str) -> None:
    """Meet the other processes that torchrun started: over NCCL for tensors on GPUs, over gloo for those on CPUs.

    Raises:
        ValueError: a variable that torchrun sets is missing.
    """
    if dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set and {', '.join(missing)} is not; start several processes with torchrun")
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)


def leave() -> None:
    """End what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
