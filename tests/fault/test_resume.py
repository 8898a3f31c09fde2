"""A run that is killed, stopped or damaged continues as if nothing had happened, or says what is wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_distillation import small_distillation
from small_run import small_config, small_model, small_run, small_stream
from torch import nn

from minitron.data.packing import Batch
from minitron.train import resume
from minitron.train.log import METRICS_FILE
from minitron.train.loop import RUN_FILE, LossFunction, TrainError, next_token_loss, train

STEPS = 24


def start(run: Path, program: str = "small_run.py") -> subprocess.Popen[str]:
    script = Path(__file__).parents[1] / "samples" / program
    command = [sys.executable, str(script), str(run), str(STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def newest(run: Path) -> int:
    return max((step for step, _ in resume.list_steps(run)), default=0)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    while newest(run) < step and process.poll() is None:
        time.sleep(0.01)


def content(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "model.safetensors"), **load_file(folder / resume.OPTIMIZER_FILE)}


def assert_same(left: Path, right: Path) -> None:
    a, b = content(left), content(right)
    assert a.keys() == b.keys()
    assert any(name.startswith("exp_avg_sq.") for name in a)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def losses(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / METRICS_FILE).read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def stop_after(run: Path, step: int, number: int = signal.SIGTERM) -> LossFunction:
    """The usual loss, with one signal once there is a checkpoint of that step."""
    sent = []

    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        if newest(run) == step and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return next_token_loss(model, batch)

    return loss


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The order of summation depends on the number of threads, and with it the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    small_run(run, STEPS)
    return run


def test_kill_9_at_random_moments_changes_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    moments = random.Random(time.time_ns())
    killed = 0
    for least in (1, 10):
        process = start(run)
        wait_for_step(run, least + moments.randrange(8), process)
        time.sleep(moments.random() * 0.05)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
    assert killed == 2
    assert 2 <= newest(run) < STEPS
    result = small_run(run, STEPS)
    assert result.step == STEPS
    assert_same(run / f"step-{STEPS}", uninterrupted / f"step-{STEPS}")
    assert losses(run) == losses(uninterrupted)
    assert not list(run.glob(".step-*"))


def test_kill_9_changes_nothing_in_a_distillation_either(tmp_path: Path) -> None:
    """With accumulation, dropout, a trained projection and a teacher that learns, all of which must come back."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    small_distillation(whole, STEPS)
    moments = random.Random(time.time_ns())
    process = start(run, "small_distillation.py")
    wait_for_step(run, 2 + moments.randrange(12), process)
    time.sleep(moments.random() * 0.05)
    process.kill()
    process.communicate()
    assert 2 <= newest(run) < STEPS
    small_distillation(run, STEPS)
    names = content(run / f"step-{STEPS}")
    assert any("projection" in name for name in names)
    assert any(name.startswith("parameter.loss.corrected.") for name in names)
    assert_same(run / f"step-{STEPS}", whole / f"step-{STEPS}")
    assert losses(run) == losses(whole)


def _fail_at(monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    """From now on the disk is full once `write` of a checkpoint begins, with a part of its file written."""
    from minitron.train import resume as module

    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def sync(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(module, write, full if write == "save_file" else sync)


@pytest.mark.parametrize("write", ["save_file", "_sync"])
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_later(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    run = tmp_path / "run"
    train(small_model(0.1), small_stream(), small_config(STEPS), run, quiet=True, until=5)
    with monkeypatch.context() as patched:
        _fail_at(patched, write)
        says = (
            r"step-6: the checkpoint could not be written \(No space left on device; [0-9,]+ bytes are free .*\); "
            r".*step-5 is intact"
        )
        with pytest.raises(resume.CheckpointError, match=says):
            small_run(run, STEPS)
    assert newest(run) == 5
    assert not list(run.glob(".step-*"))  # what was written of the new one does not keep the disk full
    small_run(run, STEPS)
    assert_same(run / f"step-{STEPS}", uninterrupted / f"step-{STEPS}")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(resume.CheckpointError, match=r"No space left.*step-\d+ is intact") as error:
            train(small_model(0.1), small_stream(), small_config(STEPS, keep=50), disk / "run", quiet=True)
        last = newest(disk / "run")
        assert f"step-{last} is intact" in str(error.value)
        resume.check_step(disk / "run" / f"step-{last}")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_sigterm_saves_and_exits_cleanly_and_the_run_continues(tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    process = start(run)
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "finished" in output
    assert 3 <= newest(run) < STEPS
    small_run(run, STEPS)
    assert_same(run / f"step-{STEPS}", uninterrupted / f"step-{STEPS}")


def test_a_signal_ends_the_run_with_its_name_and_gives_the_handlers_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    interrupting = stop_after(run, 3, signal.SIGINT)
    result = train(small_model(), small_stream(), small_config(9), run, loss=interrupting, quiet=True)
    assert result.stopped_by == "SIGINT"
    assert result.step == 4
    assert result.checkpoint.name == "step-4"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "state"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, uninterrupted: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(small_model(0.1), small_stream(), small_config(STEPS), run, loss=stop_after(run, 6), quiet=True)
    (_, before), (_, last) = resume.list_steps(run)
    file = last / ("state.json" if damage == "state" else resume.OPTIMIZER_FILE)
    raw = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        middle = len(raw) // 2
        file.write_bytes(
            raw[:middle] if damage != "flip" else raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
        )
    result = small_run(run, STEPS)
    errors = capfd.readouterr().err
    assert "skipped a damaged checkpoint" in errors
    assert str(file) in errors
    assert f"continuing from {before}" in errors
    assert_same(result.checkpoint, uninterrupted / f"step-{STEPS}")


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small_run(run, 3)
    for _, folder in resume.list_steps(run):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(TrainError, match=r"no checkpoint in .* is whole.*step-3/model.safetensors.*step-2/model"):
        small_run(run, 3)


def test_a_folder_of_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small_run(run, 2)
    with pytest.raises(TrainError, match=r"train lr was 0.003, is 0.1$"):
        train(small_model(0.1), small_stream(), small_config(2, lr=0.1), run, quiet=True)
    model = small_model(0.2)
    with pytest.raises(TrainError, match=r"model attention_dropout was 0.1, is 0.2$"):
        train(model, small_stream(), small_config(2), run, quiet=True)
    (run / RUN_FILE).write_text("{")
    with pytest.raises(TrainError, match=r"train.json: cannot be read"):
        small_run(run, 2)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(TrainError, match="not the folder of a run"):
        small_run(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = small_run(run, 3)
    again = small_run(run, 3)
    assert again.loss is None
    assert (again.step, again.checkpoint) == (first.step, first.checkpoint)
    assert len(losses(run)) == 3


def test_only_the_last_checkpoints_and_the_one_before_the_decay_are_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(small_model(), small_stream(), small_config(20, decay=0.5), run, quiet=True)
    kept = [step for step, _ in resume.list_steps(run)]
    assert kept[-2:] == [19, 20]
    assert len(kept) == 3
    # The schedule begins to go down past the middle; up to there the learning rate was level.
    rates = {row["step"]: row["lr"] for row in map(json.loads, (run / METRICS_FILE).read_text().splitlines())}
    assert rates[kept[0]] == max(rates.values())
    assert rates[kept[0] + 1] < rates[kept[0]]
