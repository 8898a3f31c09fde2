"""Sharded parameters: the norm of their gradients, their checkpoints, and the whole model made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor

from ..checkpoint.limits import CheckpointError
from ..files import explain
from ..world import World
from . import eight_bits
from .resume import begin_step, failed_step, file_sha256, finish_step

FOLDER = "sharded"


def gradient_norm(parameters: Iterable[nn.Parameter], world: World) -> float:
    """Euclidean norm of all gradients together, the same in every process."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world.mesh is None:
        return nn.utils.get_total_norm(gradients).item()
    # Sums of squares of this process's parts: those split over the data axis only, and those split over both axes.
    # Norms of heads and biases of row-wise split matrices are whole along the tensor axis, so they count once.
    device = gradients[0].device if gradients else "cpu"
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        both = isinstance(gradient, DTensor) and len(gradient.placements) == 2 and gradient.placements[1].is_shard()
        squares[int(both)] += local.float().norm().double().square()
    squares = squares.cpu()  # one transfer for all of them
    dist.all_reduce(squares, group=world.mesh.get_group("data"))
    split = squares[1:].clone()
    dist.all_reduce(split, group=world.mesh.get_group("tensor"))
    return math.sqrt(squares[0].item() + split.item())


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint was written by several processes."""
    return (folder / FOLDER).is_dir()


def save(
    world: World,
    run: Path,
    step: int,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    write_rest: Callable[[Path], None],
) -> Path:
    """Write a checkpoint in which each process writes its own shards (torch.distributed.checkpoint).

    As `resume.save_step`: complete or not there, with checksums.

    Raises:
        CheckpointError: a process could not write; in all processes.
    """
    work = Path(world.first_does(lambda: begin_step(run, step)))
    problem: str | None = None
    sums: dict[str, str] = {}
    try:
        save_shards(dict(tensors), checkpoint_id=work / FOLDER)
        mine = (work / FOLDER).glob(f"__{world.rank}_*")
        sums = {str(path.relative_to(work)): file_sha256(path) for path in mine}
    except (OSError, CheckpointException) as error:
        problem = _reason(error, run / f"step-{step}")
    answers = world.gather((problem, sums))

    def finish() -> Path:
        failed = [text for text, _ in answers if text]
        if failed:
            raise failed_step(run, step, OSError(failed[0]))
        try:
            write_rest(work)
            return finish_step(run, step, state, {k: v for _, part in answers for k, v in part.items()})
        except OSError as error:
            raise failed_step(run, step, error) from None

    return world.first_does(finish)


def _reason(error: BaseException, path: Path) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return explain(error, path)


def load(folder: Path, like: Mapping[str, nn.Parameter], names: Iterable[str], suffix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint; of those that belong to a parameter, the shard of this process.

    Args:
        folder: the checkpoint.
        like: parameters by name; their tensors are sharded in the same way.
        names: the parameters whose tensors are wanted.
        suffix: which random state to load, if it is there.

    Raises:
        CheckpointError: a tensor is missing or has another shape than its parameter.
    """
    reader = FileSystemReader(folder / FOLDER)
    metadata: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    wanted: dict[str, Tensor] = {}
    for name in names:
        parameter = like[name]
        for key in (f"parameter.{name}", f"exp_avg.{name}", f"exp_avg_sq.{name}"):
            if key in metadata:
                if metadata[key].size != parameter.shape:
                    raise CheckpointError(
                        f"{folder}: {name} has shape {list(metadata[key].size)}, the model's {list(parameter.shape)}"
                    )
                wanted[key] = torch.empty_like(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            for part, dtype in ((eight_bits.CODES, torch.uint8), (eight_bits.SCALES, torch.float32)):
                if f"{key}/{part}.{name}" in metadata:
                    wanted[f"{key}/{part}.{name}"] = torch.empty_like(parameter, dtype=dtype)
        if f"step.{name}" in metadata:
            wanted[f"step.{name}"] = torch.zeros(())
        if f"parameter.{name}" not in metadata:
            raise CheckpointError(f"{folder}: {name} is missing")
    for key in (f"rng.cpu{suffix}", f"rng.cuda{suffix}"):
        if key in metadata:
            wanted[key] = torch.empty(metadata[key].size, dtype=torch.uint8)
    load_shards(wanted, storage_reader=reader)
    return wanted


def whole_weights(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The whole weights of the model, on the CPU of the first process; empty in the others."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if world.first:
            weights[name] = whole.cpu()
    return weights
