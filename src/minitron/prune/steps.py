"""The steps of a pruning run as functions of values: importance, candidates, ranking, cut with compensation.

`pipeline.PruneJob` runs them for `minitron prune`, the stages of `compress` run them for a recipe.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import ModelConfig
from ..data.packing import Batch
from ..load_meter import LoadMeter
from ..world import World, current_world
from . import costs
from .architecture import Architecture
from .compensation import CompensatedPart, compensate
from .depth import Progress
from .importance import compute_importance
from .plan import PrunePlan
from .rank import Ranked, rank_candidates, zero_shot
from .scores import Scores
from .search import Budget, Candidate, Grid, Machine, SearchError, enumerate_architectures, unused
from .surgery import SurgeryReport, prune_checkpoint


def measure_importance(
    source: Path,
    blocks: Batch,
    path: Path,
    *,
    depth: str = "influence",
    windows: Sequence[int] = (),
    work: Path | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit on calibration blocks, which the processes of `world` divide, and write the scores to `path`.

    The arguments are those of `importance.compute_importance`.
    """
    world = world or current_world()
    scores = compute_importance(
        source, blocks, depth=depth, windows=windows, work=work, device=device, progress=progress, world=world
    )

    def finish() -> None:
        scores.save(path)
        if work is not None and work.is_dir() and not any(work.iterdir()):  # where each process had its own folder
            work.rmdir()

    world.first_does(finish)
    return scores


@dataclass(frozen=True)
class FoundCandidates:
    """The shapes within a budget."""

    candidates: list[Candidate]
    machine: Machine
    """What memory and speed were counted with."""
    notes: tuple[str, ...]
    """Sentences about how the budget was met and how speeds were predicted."""
    doubt: str = ""
    """The one of them that says why the prediction is not to be trusted, if so."""


def find_candidates(
    config: ModelConfig, budget: Budget, machine: Machine, grid: Grid | None = None, *, try_engine: bool = True
) -> FoundCandidates:
    """Every shape of a grid within a budget.

    Args:
        config: of the model to prune.
        budget: the limit.
        machine: dtype and context of the budget. For a budget of speed its bandwidth is measured if it is not known.
        grid: shapes to look at; `Grid.around(config)` if None.
        try_engine: for a budget of speed, predict from a short run of the engine instead of the bandwidth.

    Raises:
        SearchError: no shape is within the budget, or nothing needs to be cut.
    """
    notes: list[str] = []
    doubt = ""
    if budget.kind == "speed":
        if machine.bytes_per_second is None:
            machine = costs.with_bandwidth(machine)
        if try_engine:
            machine, doubt, how = _measured_by_engine(config, budget, machine, grid)
            notes += [*filter(None, [doubt]), how]
    found = enumerate_architectures(config, budget, grid, machine)
    notes += filter(None, [unused(budget, found)])
    return FoundCandidates(found, machine, tuple(notes), doubt)


def _measured_by_engine(
    config: ModelConfig, budget: Budget, machine: Machine, grid: Grid | None
) -> tuple[Machine, str, str]:
    """The machine by a run of the engine on random weights, of a shape that the bandwidth alone would choose.

    Returns:
        The machine, a sentence if it was busy, and one about how speeds are predicted.
    """
    try:
        found = enumerate_architectures(config, budget, grid, machine)
        typical = found[len(found) // 2].architecture.config(config)
    except SearchError:
        typical = config
    with LoadMeter(torch.get_num_threads()) as load:
        measured = costs.with_engine(machine, typical)
    doubt = (
        f"The shape was chosen by speeds that were predicted from a run on a busy machine ({load.reason}); "
        f"on a free one the same budget gives a larger model."
        if load.reason
        else ""
    )
    if measured == machine:
        return machine, doubt, "Speeds are predicted from the bandwidth of the memory."
    return measured, doubt, "Speeds are predicted from a short run of the engine on random weights of such a shape."


def rank_zero_shot(
    source: Path,
    candidates: Sequence[Candidate],
    plan_of: Callable[[Architecture], PrunePlan],
    blocks: Batch,
    path: Path,
    *,
    measure: Literal["loss", "kl"] = "loss",
    device: torch.device | str = "cpu",
    progress: Callable[[Ranked, int], object] = lambda *_: None,
) -> list[Ranked]:
    """Rank shapes by what they lose right after the cut, best first; `path` keeps the scores.

    The arguments are those of `rank.zero_shot` and `rank.rank_candidates`.
    """
    scorer = zero_shot(source, blocks, measure, device=device)
    return rank_candidates(candidates, plan_of, scorer, path, progress)


@dataclass(frozen=True)
class Cut:
    """What `cut` did."""

    report: SurgeryReport
    compensated: list[CompensatedPart]
    """Norms and projections that were fitted, accepted or not; empty without calibration text."""


def cut(
    source: Path,
    plan: PrunePlan,
    out: Path,
    *,
    calibration: Batch | None = None,
    device: torch.device | str = "cpu",
    cutting: Callable[[int], object] = lambda _: None,
    compensating: Callable[[int, int], Any] = lambda *_: None,
) -> Cut:
    """Write `out`: what a plan for `source` keeps of it; an `out` of an interrupted run is replaced.

    Args:
        source: checkpoint that the plan was made for, which is not checked again.
        plan: what stays.
        out: folder to write.
        calibration: text (B, T) on which what stays is compensated for what goes; None for the plain cut.
        device: where the compensation runs.
        cutting: called with the bytes of each block that is written.
        compensating: called with (layers done, layers).

    Raises:
        CheckpointError, StreamError, TargetError, WriteError: see `prune_checkpoint` and `compensate`.
    """
    draft = out if calibration is None else out.with_name(f"{out.name}-as-cut")
    report = prune_checkpoint(source, draft, plan, check_source=False, overwrite=True, progress=cutting)
    if calibration is None:
        return Cut(report, [])
    parts = compensate(source, draft, plan, calibration, out, device=device, overwrite=True, progress=compensating)
    shutil.rmtree(draft)
    return Cut(report, parts)
