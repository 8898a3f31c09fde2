"""The processes that work together: how many there are, which one this is, and what they agree on.

Training, calibration and recipes all ask a `World`; nothing else in the package talks to torch.distributed about
processes. Without torchrun there is one process, and every method returns at once.
"""

from __future__ import annotations

import datetime
import functools
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Processes that share a piece of work; one alone by default. Small values are exchanged between the CPUs.

    All processes must call the same methods in the same order.
    """

    mesh: DeviceMesh | None = None
    """How training is split, (data, tensor): processes along `data` have different sequences, those along `tensor`
    parts of each matrix. None in one process, and where nothing is trained."""
    rank: int = 0
    """Which process this is, from 0."""
    size: int = 1
    """How many processes there are."""

    @property
    def data_rank(self) -> int:
        """Which share of the data this process has, from 0."""
        return self.rank if self.mesh is None else self.mesh.get_local_rank("data")

    @property
    def data_size(self) -> int:
        """Into how many shares the data is split."""
        return self.size if self.mesh is None else self.mesh.size(0)

    @property
    def local_size(self) -> int:
        """How many of the processes run on this machine; all of them if torchrun does not say."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the shares of the data, in float64; all processes must name the same ones."""
        if self.data_size == 1:
            return dict(values)
        names = sorted(values)
        total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
        dist.all_reduce(total, group=None if self.mesh is None else self.mesh.get_group("data"))
        return dict(zip(names, total.tolist(), strict=True))

    def add_up(self, value: T) -> T:
        """The sum of what all processes have, in the order of the processes, so that each computes the same."""
        return functools.reduce(operator.add, self.gather(value))  # type: ignore[arg-type]

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        if self.size == 1:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def agree(self, value: Any) -> Any:
        """The value of the first process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def own_folder(self, folder: Path | None) -> Path | None:
        """A folder of this process's own inside `folder`, where there are several processes."""
        return folder if folder is None or self.size == 1 else folder / f"rank-{self.rank}-of-{self.size}"

    def first_does(self, action: Callable[[], T]) -> T:
        """Let the first process do something while the others wait; all get its result, or raise its error.

        Without this an error in one process leaves the others waiting for an hour.
        """
        if self.size == 1:
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
        """Let the first process do something, then the others, which find its work on the disk; each gets its own
        result."""
        box: list[T] = []

        def once() -> None:
            box.append(action())

        self.first_does(once)
        return box[0] if box else action()


def current_world() -> World:
    """The processes that `join`, or a caller's own torch.distributed, brought together; this one alone without."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(None, dist.get_rank(), dist.get_world_size())


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str, patience_hours: float = 1) -> None:
    """Connect to the other processes of torchrun: over NCCL for tensors on GPUs, over gloo for those on CPUs.

    Args:
        device: as on the command line.
        patience_hours: how long a process waits for the others, of which the first may work alone in between, for
            instance write a checkpoint of many gigabytes.

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
    timeout = datetime.timedelta(hours=patience_hours)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)


def fails_first() -> bool:
    """Whether no other process has failed before this one, which is failing now; it then says why for all of them.

    When one process fails, the others lose their connection to it and fail too, for no reason of their own.
    """
    if not dist.is_initialized():
        return True
    try:
        # No documented function hands out the store that the processes met at.
        return dist.distributed_c10d._get_default_store().add("minitron/failures", 1) == 1
    except RuntimeError:
        return False  # the process that holds the store is gone: it failed first


def leave() -> None:
    """Undo `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()
