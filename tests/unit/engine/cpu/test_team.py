"""The number of threads against simulated machines, and the numbers that are computed while it changes."""

from __future__ import annotations

import itertools

import pytest
import torch
from engine_models import some_tokens, tiny_model

from minitron.engine.cpu import team as team_file
from minitron.engine.cpu.team import Team, latest_size
from minitron.engine.weights import from_model


def run(team: Team, seconds: float, pace: dict[int, float], interrupted: bool, start: float = 0.0) -> dict[int, float]:
    """Seconds spent with each number of threads on a machine with this pace, in bursts of 20 ms."""
    spent = dict.fromkeys(team.options, 0.0)
    now = start
    while now < start + seconds:
        size = team.size
        steps = max(1, int(0.02 / pace[size]))
        now += steps * pace[size]
        spent[size] += steps * pace[size]
        team.saw(steps, steps * pace[size], interrupted, now)
    return spent


def test_a_free_machine_never_tries_fewer_threads() -> None:
    team = Team(8)
    assert run(team, 20.0, {8: 1e-4, 4: 2e-4, 2: 4e-4, 1: 8e-4}, interrupted=False)[8] == pytest.approx(20.0, abs=0.1)


def test_fewer_threads_where_they_are_faster_and_all_again_afterwards() -> None:
    team = Team(2)
    busy = run(team, 20.0, {2: 60e-3, 1: 10e-3}, interrupted=True)
    assert busy[1] > 0.85 * 20
    free = run(team, 20.0, {2: 4e-3, 1: 8e-3}, interrupted=False, start=20.0)
    assert free[2] > 0.7 * 20  # after at most four seconds all threads are tried again


def test_interruptions_alone_do_not_matter() -> None:
    team = Team(4)
    spent = run(team, 20.0, {4: 1e-3, 2: 1.5e-3, 1: 3e-3}, interrupted=True)
    assert spent[4] > 0.85 * 20


def test_a_new_team_begins_with_what_the_last_one_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team_file, "_latest", {})
    assert latest_size(2, 5.0) == 2
    busy, free = {2: 60e-3, 1: 10e-3}, {2: 4e-3, 1: 8e-3}
    run(Team(2), 1.0, busy, interrupted=True)
    assert latest_size(2, 1.5) == 1
    assert latest_size(4, 1.5) == 4
    assert latest_size(2, 6.0) == 2  # long ago
    second = Team(2, latest_size(2, 1.5))
    assert run(second, 20.0, busy, interrupted=True, start=1.5)[1] > 0.85 * 20
    assert run(second, 20.0, free, interrupted=False, start=21.5)[2] > 0.7 * 20


def test_tuning_again_does_not_lose_threads() -> None:
    from minitron.engine.cpu.engine import CpuEngine

    with CpuEngine(from_model(tiny_model()), 8, threads=2) as engine:
        engine.step([1])
        engine._team.size = 1  # as on a busy machine
        engine.tune()
        assert engine._team.options == [2, 1]


def test_one_thread_has_no_choice() -> None:
    team = Team(1)
    assert run(team, 1.0, {1: 1e-3}, interrupted=True).keys() == {1}


def test_the_numbers_do_not_depend_on_changes_of_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.engine.cpu.engine import CpuEngine

    weights, tokens = from_model(tiny_model()), some_tokens(40)
    with CpuEngine(weights, 48, threads=1) as engine:
        expected = torch.cat([engine.step([token]).clone() for token in tokens])
    sizes = itertools.cycle((3, 1, 2, 2, 1))
    with CpuEngine(weights, 48, threads=3) as engine:
        found = []
        for token in tokens:
            engine._team.size = next(sizes)
            found.append(engine.step([token]).clone())
            engine._team._begin()
    assert torch.equal(torch.cat(found), expected)
