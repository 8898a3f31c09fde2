"""Several processes train as one does: losses, weights, checkpoints that another number of processes continues."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron import NemotronForCausalLM

# Between one process and several only the order of sums differs: fp32 to a relative 1e-5.
LOSS = 1e-5
WEIGHT = {"rtol": 1e-3, "atol": 1e-5}
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("dist")
    script = Path(__file__).with_name("worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(where)], capture_output=True, text=True, timeout=600, env=environment
    )
    assert (where / "results.json").is_file(), done.stderr[-3000:]
    return where


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def numbers(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row[name] for row in rows if name in row}
    assert list(steps) == sorted(steps)
    return list(steps.values())


def assert_same_run(one: Path, other: Path, names: tuple[str, ...]) -> None:
    for name in names:
        expected = numbers(one, name)
        assert len(expected) == STEPS
        assert numbers(other, name) == pytest.approx(expected, rel=LOSS), name
    left, right = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, **WEIGHT, msg=name)


@pytest.mark.parametrize("name", ["two", "tensor", "grid"])
def test_many_processes_train_as_one(folder: Path, results: dict[str, Any], name: str) -> None:
    """Two that share the data, two that share matrices, and four that do both in pairs."""
    assert "error" not in results[name], results[name]
    assert_same_run(folder / "one", folder / name, ("loss", "grad_norm"))
    heldout = results[name]["heldout"]["t"]
    assert heldout == pytest.approx(results["one"]["heldout"]["t"], rel=LOSS)


@pytest.mark.parametrize("kind", ["llama-biased", "qwen2", "qwen3"])
def test_relatives_share_matrices_as_nemotron_does(folder: Path, results: dict[str, Any], kind: str) -> None:
    """Biases after a sum over processes, and norms of heads, are whole in each process and count once in the norm."""
    assert "error" not in results[f"{kind}-many"], results[f"{kind}-many"]
    assert_same_run(folder / f"{kind}-one", folder / f"{kind}-many", ("loss", "grad_norm"))


@pytest.mark.parametrize("name", ["2-4", "4-1", "1-2"])
def test_another_number_of_processes_continues_a_run(folder: Path, results: dict[str, Any], name: str) -> None:
    assert results[name]["before"]["stopped_by"] == "until=3", results[name]
    assert results[name]["step"] == STEPS
    assert_same_run(folder / "one", folder / name, ("loss", "grad_norm"))


@pytest.mark.parametrize(("name", "tolerance"), [("8-bit-2-2", 0.0), ("8-bit-2-1", 1e-4), ("8-bit-1-2", 1e-4)])
def test_8_bit_averages_continue_in_any_number_of_processes(
    folder: Path, results: dict[str, Any], name: str, tolerance: float
) -> None:
    """In as many processes as before bit for bit: what is stored in fp32 comes back as the same bytes."""
    assert "error" not in results["8-bit"], results["8-bit"]
    assert results[name].get("before", {}).get("stopped_by") == "until=3", results[name]
    found, expected = (numbers(folder / each, "loss") for each in (name, "8-bit"))
    assert len(expected) == STEPS
    assert found == pytest.approx(expected, rel=tolerance, abs=0)


def test_distillation_in_two_processes_is_that_in_one(folder: Path, results: dict[str, Any]) -> None:
    """With a projection and a teacher that are trained too, and continued by one process."""
    names = ("loss", "kl", "ce", "top1", "hidden", "teacher_ce", "grad_norm", "teacher_grad_norm")
    for name in ("distill-two", "distill-2-1"):
        assert "error" not in results[name], results[name]
        assert_same_run(folder / "distill-one", folder / name, names)
        found, expected = (results[key]["heldout"]["t"] for key in (name, "distill-one"))
        assert found == pytest.approx(expected, rel=LOSS)
    assert "error" not in results["frozen-two"], results["frozen-two"]
    assert_same_run(folder / "frozen-one", folder / "frozen-two", ("loss", "kl", "hidden", "grad_norm"))


def test_the_model_at_the_end_is_a_plain_folder(folder: Path) -> None:
    for name in ("two", "grid", "distill-two"):
        model, info = NemotronForCausalLM.from_pretrained(folder / name / "model", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert all(math.isfinite(p.sum().item()) for p in model.parameters())
    assert not list((folder / "two").glob(".*"))
    assert (folder / "two" / "step-6" / "sharded" / ".metadata").is_file()


def test_a_batch_that_cannot_be_shared_is_refused_by_every_process(results: dict[str, Any]) -> None:
    assert "micro_batch is 8; it must be a divisor of batch / 2 processes, which is 4" in results["too-many"]["error"]
