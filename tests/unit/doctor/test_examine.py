"""`minitron doctor`: each probe beside what the machine itself says, and with what it lacks taken away."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet

from minitron import framework, tested
from minitron.doctor import disk, examine, gpu, machine, packages
from minitron.doctor.finding import Finding, guarded

ROOT = Path(__file__).parents[3]


def test_the_tested_releases_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name: pinned[name] for name in tested.PINNED} == tested.PINNED
    assert tested.PINNED["transformers"] in framework.TESTED
    required = {requirement.name.lower() for requirement in packages._requirements()[""]}
    assert required == set(tested.PINNED)


def test_every_probe_is_answered_and_none_imports_torch() -> None:
    code = (
        "import sys; from minitron.doctor import examine; found = examine(False);"
        "assert all(f.status != 'unknown' for f in found), found;"
        "print(len(found), sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "9 []\n"


def test_an_error_of_a_probe_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise ZeroDivisionError("no cores")

    assert guarded("cores", broken) == Finding(
        "cores", "unknown", "could not be examined (ZeroDivisionError: no cores)"
    )
    monkeypatch.setattr(os, "cpu_count", broken)
    found = {finding.subject: finding.status for finding in examine(False, measure=False)}
    assert found["cores"] == "unknown"
    assert found["memory"] != "unknown"


# --- packages --------------------------------------------------------------------------------------------------------


def with_versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    real = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: changed.get(name, real(name)))


def test_versions_are_those_that_python_finds() -> None:
    rows = {row["name"]: row for row in packages.versions().facts["packages"]}
    assert rows["torch"]["installed"] == metadata.version("torch")
    for row in rows.values():
        assert row["in_range"] == SpecifierSet(row["allowed"]).contains(row["installed"])


def test_a_missing_package_is_a_problem_with_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, numba=None)
    found = packages.versions()
    assert found.status == "problem"
    assert any(sentence.startswith("numba is missing: pip install 'numba>=") for sentence in found.advice)


def test_a_package_outside_its_range_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, transformers="4.57.0")
    found = packages.versions()
    assert found.status == "problem"
    assert any(sentence.startswith("transformers 4.57.0 is outside ") for sentence in found.advice)


def test_an_untested_release_is_a_note_that_says_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, transformers="5.99.1")
    found = packages.versions()
    assert found.status == "note"
    assert "transformers 5.99.1 (tested: 5.23.0)" in " ".join(found.advice)
    assert "checks itself" in " ".join(found.advice)


def test_a_local_build_of_the_tested_release_is_the_tested_release(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, **{**tested.PINNED, "torch": f"{tested.PINNED['torch']}+cu130"})
    assert packages.versions().status == "ok"


def test_an_extra_that_is_not_complete_is_named_with_what_it_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, starlette=None, matplotlib="0.1")
    found = packages.extras()
    assert found.facts["missing"]["serve"] == ["starlette"]
    assert found.facts["missing"]["plot"] == ["matplotlib"]
    assert "serve: pip install 'minitron[serve]' (brings starlette)" in found.advice


# --- machine ---------------------------------------------------------------------------------------------------------


def test_the_features_of_the_processor_are_those_of_the_system() -> None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("reads /proc")
    flags = set(next(line for line in info.read_text().splitlines() if line.startswith("flags")).split())
    found = set(machine.processor().facts["features"])
    for llvm, linux in (("avx2", "avx2"), ("avx512f", "avx512f"), ("fma", "fma"), ("avx512vnni", "avx512_vnni")):
        assert (llvm in found) == (linux in flags)


def test_a_processor_without_avx2_gets_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    from llvmlite import binding

    monkeypatch.setattr(binding, "get_host_cpu_features", dict)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    found = machine.processor()
    assert found.status == "note"
    assert "Without AVX2" in found.advice[0]


def test_the_quota_of_a_container_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limit = tmp_path / "sys/fs/cgroup/cpu.max"
    limit.parent.mkdir(parents=True)
    for text, quota in (("max 100000", None), ("250000 100000", 2.5)):
        limit.write_text(text)
        found = machine.cores()
        assert found.facts["quota"] == quota
        assert ("set OMP_NUM_THREADS=2" in " ".join(found.advice)) == (quota is not None)


def test_a_number_of_threads_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert "OMP_NUM_THREADS is 'many'; it must be a number of at least 1." in machine.cores().advice


@pytest.mark.parametrize(("free", "status"), [(16_000_000_000, "ok"), (1_000_000_000, "note"), (None, "unknown")])
def test_memory_says_what_fits(free: int | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.free_memory, "available_memory", lambda: free)
    found = machine.memory()
    assert found.status == status
    if free == 16_000_000_000:
        assert found.facts["parameters_that_fit"]["bf16"] == 6_400_000_000
        assert "6.4B in bf16" in found.text


def test_bandwidth_counts_every_byte_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 1 << 20)
    ticks = iter(range(100))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(ticks)))  # each sum takes one second
    assert machine._read_rate(3) == pytest.approx((1 << 20) / 1e9)


# --- GPU -------------------------------------------------------------------------------------------------------------


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    build = f"cuda {torch.version.cuda}" if torch.version.cuda else "cpu"
    assert gpu.torch_build() == build or torch.version.hip


def test_without_a_driver_everything_is_right() -> None:
    assert gpu.gpu(False).status == "ok"


@pytest.mark.parametrize(
    ("build", "devices", "triton", "advice"),
    [
        ("cpu", True, "3.9", "This torch cannot use the GPU"),
        ("cuda 12.8", False, "3.9", "--gpus all"),
        ("cuda 12.8", True, None, "pip install 'minitron[gpu]'"),
        ("cuda 12.8", True, "3.9", ""),
    ],
)
def test_a_gpu_that_cannot_be_used_gets_advice(
    build: str, devices: bool, triton: str | None, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi is a program that answers as it does."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + ("echo 'NVIDIA H200, 143771, 570.1'\n" if devices else "exit 9\n"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "torch_build", lambda: build)
    monkeypatch.setattr(gpu, "installed", lambda name: triton)
    found = gpu.gpu(True)
    assert found.status == ("note" if advice else "ok")
    assert advice in " ".join(found.advice)
    assert ("NVIDIA H200 (140 GiB)" in found.text) == devices


# --- caches ----------------------------------------------------------------------------------------------------------


def test_caches_are_counted_and_moved_by_their_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own/converted").mkdir(parents=True)
    (tmp_path / "own/converted/x").write_bytes(bytes(3000))
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    facts = disk.caches().facts
    assert (facts["models"]["bytes"], facts["models"]["files"]) == (3000, 1)
    assert facts["hub"] == {**facts["hub"], "folder": str(tmp_path / "hf/hub"), "bytes": 0, "writable": True}


def test_a_cache_that_is_a_file_or_on_a_full_disk_gets_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch(0o755)  # what may be executed is no folder either
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "file"))
    found = disk.caches()
    assert found.status == "note"
    assert f"{tmp_path / 'file'} cannot be written. Set MINITRON_CACHE to a folder that can." in found.advice
    usage: Any = type("Usage", (), {"free": 10**9})()
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path))
    assert f"The disk of {tmp_path} has 1.0 GB free. Set MINITRON_CACHE to a larger one." in disk.caches().advice
