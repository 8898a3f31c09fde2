"""What several processes agree on, in two of them over gloo; and that one alone needs no torch.distributed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron.world import World, current_world

WORKER = """
import json, sys
import torch
from pathlib import Path
from minitron.world import current_world, leave
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
world = current_world()
def fail():
    raise ValueError("no")
def name_of_error(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
def write():
    (folder / f"written-{rank}").touch()
    return rank
found = {
    "place": [world.rank, world.size, world.data_rank, world.data_size, world.first],
    "sum": world.sum({"b": 0.1 + rank, "a": 1e-17}),
    "add_up": world.add_up([rank]),
    "any": [world.any(rank == 1), world.any(False)],
    "agree": world.agree(rank + 10),
    "gather": world.gather(rank),
    "first_does": world.first_does(write),
    "first_fails": name_of_error(lambda: world.first_does(fail)),
    "first_then_all": world.first_then_all(lambda: rank),
    "own_folder": world.own_folder(Path("work")).name,
}
(folder / f"{rank}.json").write_text(json.dumps(found))
torch.distributed.barrier()
leave()  # a process that ends while gloo's threads still run can abort
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for rank in (0, 1)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {
            "place": [rank, 2, rank, 2, rank == 0],
            "sum": {"a": 2e-17, "b": 0.1 + 1.1},
            "add_up": [0, 1],
            "any": [True, False],
            "agree": 10,
            "gather": [0, 1],
            "first_does": 0,
            "first_fails": "ValueError: no",
            "first_then_all": rank,
            "own_folder": f"rank-{rank}-of-2",
        }
    assert (tmp_path / "written-0").exists()
    assert not (tmp_path / "written-1").exists()


def test_one_process_alone() -> None:
    world = current_world()
    assert world == World()
    assert (world.rank, world.size, world.data_rank, world.data_size, world.local_size, world.first) == (
        *(0, 1, 0, 1, 1),
        True,
    )
    assert world.sum({"a": 0.5}) == {"a": 0.5}
    assert world.add_up(torch.ones(2)).tolist() == [1, 1]
    assert world.gather(3) == [3]
    assert world.own_folder(Path("work")) == Path("work")
    with pytest.raises(KeyError):
        world.first_does(lambda: {}["missing"])


def test_processes_of_a_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert World(None, 3, 8).local_size == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert World(None, 3, 8).local_size == 4
    assert World().local_size == 1
