"""The run of everything that needs a GPU, on the CPU with tiny shapes: its numbers mean nothing here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))  # where it finds `machine`
    try:
        spec = importlib.util.spec_from_file_location("gpu_benchmark", BENCHMARKS / "gpu.py")
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        yield found
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("step", ["decode", "static", "prefill", "distill", "loss", "train", "quantized", "study"])
def test_steps_measure_and_write_as_they_go(gpu: ModuleType, step: str, tmp_path: Path) -> None:
    place, written = gpu.Place(True, tmp_path / f"{step}.json"), []
    record = place.record

    def record_and_look(name: str, value: Any) -> None:
        record(name, value)
        written.append(len(json.loads(place.file.read_text())))

    place.record = record_and_look
    getattr(gpu, step)(place)
    assert written == list(range(1, len(place.found) + 1))
    assert not any("error" in value for value in place.found.values() if isinstance(value, dict))
    rates = [value for value in place.found.values() if isinstance(value, dict) and "tokens_per_s" in value]
    assert all(rate["tokens_per_s"] > 0 for rate in rates)
    if step == "decode":
        assert {f"torch zeros={zeros} batch={batch}" for zeros in (0.0, 0.9) for batch in (1, 8)} < set(place.found)


def test_a_run_goes_on_after_a_step_that_fails(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("unknown", "machine"):
        monkeypatch.setitem(gpu.STEPS, name, 900)
    results = gpu.run_all(["unknown", "machine"], True, tmp_path, seconds=1000)
    assert results == json.loads((tmp_path / "gpu.json").read_text())
    steps = results["steps"]
    assert [steps[name]["status"] for name in steps] == ["exit status 2", "done"]
    assert "invalid choice: 'unknown'" in (tmp_path / "unknown.log").read_text()
    assert steps["machine"]["found"]["machine"]["torch"]
    late = gpu.run_all(["machine"], True, tmp_path, seconds=5)
    assert late["steps"]["machine"]["status"] == "skipped: no time is left"


def test_a_step_that_hangs_is_stopped_with_what_it_has_started(gpu: ModuleType, tmp_path: Path) -> None:
    flag = tmp_path / "still here"
    child = f"import time; time.sleep(1.5); open({str(flag)!r}, 'w')"
    hangs = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    found = gpu.watch([sys.executable, "-c", hangs], tmp_path / "log", 0.7)
    assert found["status"] == "stopped after 1 s"
    assert found["seconds"] < 30
    assert gpu.watch([sys.executable, "-c", "import time; time.sleep(1.5)"], tmp_path / "log", 60)["status"] == "done"
    assert not flag.exists()


def test_without_a_gpu_it_says_what_is_missing(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.engine.cuda.device.why_no_cuda", lambda: "there is none")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"^the GPU's tests and benchmarks cannot run here: there is none$"):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--only", "decode,speed"])
    with pytest.raises(SystemExit, match="--only names 'speed'; steps are machine, tests, decode"):
        gpu.main()
