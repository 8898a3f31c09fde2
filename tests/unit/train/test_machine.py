"""What is known of devices, and how MFU is told where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_run import small_config, small_model, small_stream

from minitron.train.log import RunLog
from minitron.train.loop import train
from minitron.train.machine import PEAKS, known_peak, peak_of


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_found_by_a_device_s_name(name: str, teraflops: float | None) -> None:
    assert known_peak(name, "bfloat16") == (None if teraflops is None else teraflops * 1e12)
    assert known_peak(name, "float32") is None


def test_longer_names_come_before_those_they_contain() -> None:
    names = list(PEAKS)
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b.split()]


def test_the_peak_of_a_cuda_device_is_that_of_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_of(torch.device("cuda"), "bfloat16") == 989e12
    assert peak_of(torch.device("cuda"), "float32") is None


def test_the_peak_of_a_cpu_is_measured() -> None:
    peak = peak_of(torch.device("cpu"), "float32")
    assert peak is not None
    assert peak > 1e6


@pytest.mark.parametrize(("peak", "says"), [(None, "MFU not known"), (1e9, "MFU ")])
def test_progress_tells_mfu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak: float | None, says: str) -> None:
    shown: list[str] = []
    monkeypatch.setattr(RunLog, "show", lambda self, done, text: shown.append(text))
    config = small_config(1, save_every=0)
    train(small_model(), small_stream(), config, tmp_path / "r", quiet=True, peak_flops=peak, flops_per_token=1e4)
    assert says in shown[0]
    assert ("not known" in shown[0]) == (peak is None)
