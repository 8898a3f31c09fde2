"""Measurements: declared zeros come out as declared, and the verb says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_samples import tiny_config
from engine_models import some_tokens, tiny_model
from typer.testing import CliRunner

from minitron.cli import app
from minitron.engine import measure

pytest.importorskip("numba")


@pytest.mark.parametrize("zeros", [0.5, 0.9])
def test_declared_zeros_are_found(zeros: float) -> None:
    model = measure.random_model(tiny_config(hidden_size=256, intermediate_size=1024), zeros)
    run = measure.decode(model, some_tokens(10), 20)
    assert abs(run.zero_fraction - zeros) < 0.05
    weights = measure.weights_of(model)
    assert run.bytes_per_token < weights.bytes_per_token()
    assert weights.bytes_per_token(0.0) == weights.bytes_per_token() - 2 * 2 * 256 * 1024


def test_random_weights_are_finite() -> None:
    model = measure.random_model(tiny_config(), 0.0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    with pytest.raises(ValueError, match="zeros is 1"):
        measure.random_model(tiny_config(), 1.0)


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr("minitron.loading.load", lambda *_, **__: type("Loaded", (), {"model": tiny_model()}))
    command = ["bench", str(tmp_path), "--prompt-tokens", "5", "-n", "3", "--rounds", "2"]
    found = CliRunner().invoke(app, [*command, "--json"])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["tokens_per_s"] > 0
    assert result["times_transformers"] > 0
    assert 0 < result["zero_fraction"] < 1
    table = CliRunner().invoke(app, command)
    assert "of the MLP neurons" in table.stdout
    assert CliRunner().invoke(app, [*command, "--preset", "minitron-4b"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "--preset", "minitron-5b"]).exit_code == 2
    assert CliRunner().invoke(app, [*command, "--rounds", "0"]).exit_code == 2
