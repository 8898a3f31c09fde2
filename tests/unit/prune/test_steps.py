"""The steps that `minitron prune` and `minitron compress` share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibration import batch
from prune_samples import random_plan
from safetensors.torch import load_file
from text_checkpoint import make_text_checkpoint

from minitron.checkpoint.fingerprint import fingerprint
from minitron.checkpoint.hf import read_config
from minitron.prune import costs
from minitron.prune.architecture import Architecture
from minitron.prune.compensation import compensate
from minitron.prune.scores import Scores
from minitron.prune.search import Budget, Grid, Machine
from minitron.prune.steps import cut, find_candidates, measure_importance
from minitron.prune.surgery import prune_checkpoint
from minitron.world import World

GRID = Grid(layers=(1, 2), heads=(2, 4), groups=(2,), hidden=(24, 32), ffn=(32, 48, 64))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_checkpoint(tmp_path_factory.mktemp("steps") / "model")


def test_a_cut_is_surgery_and_with_text_surgery_and_then_compensation(source: Path, tmp_path: Path) -> None:
    config = read_config(source)
    plan = random_plan(config, Architecture.parse("ffn=40,hidden=24,heads=2", config), 0, fingerprint(source))
    blocks = batch(count=40)
    prune_checkpoint(source, tmp_path / "cut", plan)
    expected = compensate(source, tmp_path / "cut", plan, blocks, tmp_path / "fitted")
    assert cut(source, plan, tmp_path / "a").compensated == []
    assert cut(source, plan, tmp_path / "b", calibration=blocks).compensated == expected
    for ours, theirs in (("a", "cut"), ("b", "fitted")):
        left, right = (load_file(tmp_path / name / "model.safetensors") for name in (ours, theirs))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], value) for name, value in right.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "cut", "fitted"]


def test_importance_is_in_the_file_and_nothing_else_stays(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scores = measure_importance(source, batch(count=40), path, work=tmp_path / "work", world=World())
    loaded = Scores.load(path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.neurons, scores.neurons, strict=True))
    assert torch.equal(loaded.channels, scores.channels)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


def test_a_budget_of_speed_is_met_by_what_the_engine_reaches(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine reaches four fifths of the bandwidth here: shapes that need more of it are not candidates."""
    config, full = read_config(source), 1e9
    needed = Machine("fp32", 0, full).speed(config)
    assert needed is not None
    budget = Budget.parse("speed", f"{1.05 * needed}tok/s")
    monkeypatch.setattr(costs, "with_bandwidth", lambda machine: Machine(machine.dtype, machine.context, full))
    monkeypatch.setattr(costs, "with_engine", lambda machine, _: Machine(machine.dtype, machine.context, 0.8 * full))
    by_bandwidth = find_candidates(config, budget, Machine("fp32"), GRID, try_engine=False)
    by_engine = find_candidates(config, budget, Machine("fp32"), GRID)
    assert by_engine.machine.bytes_per_second == 0.8 * full
    for found in (by_bandwidth, by_engine):
        assert all(found.machine.speed(c.architecture.config(config)) >= budget.low for c in found.candidates)  # type: ignore[operator]
    largest = [max(c.parameters for c in found.candidates) for found in (by_bandwidth, by_engine)]
    assert largest[1] < largest[0]
    assert any("short run of the engine" in note for note in by_engine.notes)
    assert not by_bandwidth.notes or "engine" not in " ".join(by_bandwidth.notes)
