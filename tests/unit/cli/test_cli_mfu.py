"""The peak that MFU is told of: given, known or neither."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minitron.cli.training import announce, peak_flops
from minitron.train.schedule import TrainConfig
from minitron.world import World


def told(capsys: pytest.CaptureFixture[str], peak: float | None, how: str) -> str:
    cost: Any = SimpleNamespace(seconds_per_step=1.0, peak_bytes=1e9)
    announce(cost, range(64), TrainConfig(steps=10, batch=32, sequence=512), 1_000_000, peak, 1e9, how)
    return capsys.readouterr().err


def test_mfu_is_told_of_a_peak_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "MFU 16% of the specified 100 TFLOP/s, " in told(capsys, 1e14, "specified")
    assert "MFU not known (--peak-tflops), " in told(capsys, None, "specified")


def test_the_peak_of_a_device_without_a_data_sheet_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    place = torch.device("cuda")
    assert peak_flops(None, place, "bfloat16", World()) is None
    assert peak_flops(2.0, place, "bfloat16", World()) == 2e12
