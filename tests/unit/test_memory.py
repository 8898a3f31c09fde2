"""Free memory by fake trees of /proc and /sys: the machine, control groups of both versions, nested, in containers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron import memory
from minitron.memory import available_memory
from minitron.prune import costs
from minitron.train.memory import available_bytes

V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 4,096,000 bytes left and no control group."""
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemFree: 7 kB\nMemAvailable:   4000 kB\n")
    return tmp_path


def belongs_to(root: Path, *lines: str) -> None:
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def group(folder: Path, names: tuple[str, str], limit: object, used: int, **stat: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in {"anon": 5, **stat}.items()))


def test_of_this_machine() -> None:
    found = available_memory()
    assert found is None or found > 0


def test_of_the_machine(root: Path) -> None:
    assert available_memory() == 4000 * 1024


def test_a_system_without_proc_has_what_it_was_built_with(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "proc/meminfo").unlink()
    sizes = {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__)
    assert available_memory() == 40960
    monkeypatch.setattr(memory.os, "sysconf", lambda _: (_ for _ in ()).throw(ValueError))
    assert available_memory() is None


def test_version_2_nested_the_outer_limit_counts_and_its_file_cache_is_free(root: Path) -> None:
    belongs_to(root, "0::/outer/inner")
    outer = root / "sys/fs/cgroup/outer"
    group(outer / "inner", V2, "max", 2_500_000, inactive_file=400_000)
    group(outer, V2, 3_000_000, 2_500_000, inactive_file=300_000, active_file=100_000)
    assert available_memory() == 900_000
    group(outer / "inner", V2, 2_600_000, 2_500_000)
    assert available_memory() == 100_000
    group(outer / "inner", V2, 2_000_000, 2_500_000)
    assert available_memory() == 0


def test_version_2_in_a_container_that_sees_itself_as_the_top(root: Path) -> None:
    belongs_to(root, "0::/")
    group(root / "sys/fs/cgroup", V2, 1_000_000, 400_000)
    assert available_memory() == 600_000
    belongs_to(root, "0::/../elsewhere")  # a process from outside the namespace
    group(root / "sys/fs/elsewhere", V2, 9, 0)
    assert available_memory() == 600_000


def test_version_1_has_totals_over_the_groups_below(root: Path) -> None:
    belongs_to(root, "11:cpuset:/job", "5:memory:/job", "0::/user.slice")
    top = root / "sys/fs/cgroup/memory"
    group(top / "job", V1, 1_000_000, 250_000, inactive_file=999_999, total_inactive_file=0, total_active_file=1000)
    group(top, V1, NO_LIMIT_V1, 3_000_000)
    group(root / "sys/fs/cgroup/cpuset/job", V1, 9, 0)
    assert available_memory() == 751_000


def test_version_1_in_a_container_that_knows_its_path_on_the_host_only(root: Path) -> None:
    belongs_to(root, "5:memory:/docker/0123456789ab")
    group(root / "sys/fs/cgroup/memory", V1, 500_000, 100_000)
    assert available_memory() == 400_000


@pytest.mark.parametrize("damage", ["", "words", "nothing:here", "5:memory", "0::"])
def test_what_cannot_be_read_limits_nothing(root: Path, damage: str) -> None:
    belongs_to(root, damage)
    group(root / "sys/fs/cgroup/a", V2, "many", 0)
    (root / "sys/fs/cgroup/memory.max").write_text("7")
    assert available_memory() == 4000 * 1024


def test_training_and_pruning_ask_this_probe(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    belongs_to(root, "0::/job")
    group(root / "sys/fs/cgroup/job", V2, 1_000_000, 400_000)
    assert available_bytes(torch.device("cpu")) == 600_000
    assert available_bytes(torch.device("meta")) is None
    from minitron import NemotronConfig

    # 2.5 copies of 2 bytes in 0.8 of what is free: 96,000 values.
    shape = {"num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 1, "hidden_size": 16}
    small, large = (NemotronConfig(vocab_size=size, **shape) for size in (1000, 4000))  # type: ignore[arg-type]
    assert small.num_parameters() < 96_000 < large.num_parameters()
    assert costs.runs_in_memory([small], 2)
    assert not costs.runs_in_memory([large], 2)
    assert not costs.runs_in_memory([small, small, small], 2)
