"""Measurements: declared zeros come out as declared, and the verb says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_samples import tiny_config
from engine_models import some_tokens, tiny_model
from family_samples import KINDS, kind_config
from typer.testing import CliRunner

from minitron import NemotronConfig
from minitron.bench import measure
from minitron.bench.peers import TransformersPeer
from minitron.cli import app
from minitron.engine.model_weights import weights_of


@pytest.mark.parametrize("times", [1, 2, 8])
def test_a_widened_model_computes_the_same_function(times: int) -> None:
    model = tiny_model(torch.float64)
    wide = measure.widened(model, times)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert all(getattr(wide.config, name) == times * getattr(model.config, name) for name in sizes)
    ids = torch.tensor([some_tokens(20)])
    with torch.inference_mode():
        torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_widened_is_refused() -> None:
    with pytest.raises(ValueError, match="times is 3; it must be a power of two"):
        measure.widened(tiny_model(), 3)
    with pytest.raises(ValueError, match="has biases in its projections"):
        measure.widened(tiny_model(mlp_bias=True), 2)


@pytest.mark.parametrize("zeros", [0.5, 0.9])
def test_declared_zeros_are_found(zeros: float) -> None:
    model = measure.random_model(tiny_config(hidden_size=256, intermediate_size=1024), zeros)
    weights = weights_of(model)
    run = measure.decode(weights, some_tokens(10), 20)
    assert abs(run.zero_fraction - zeros) < 0.05
    assert run.bytes_per_token < weights.bytes_per_token()
    assert weights.bytes_per_token(0.0) == weights.bytes_per_token() - 2 * 2 * 256 * 1024


def test_random_weights_are_finite() -> None:
    model = measure.random_model(tiny_config(), 0.0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    with pytest.raises(ValueError, match="zeros is 1"):
        measure.random_model(tiny_config(), 1.0)


def test_shortened_shapes_keep_the_share_of_each_part() -> None:
    config = NemotronConfig.preset("minitron-4b")
    short = measure.shortened(config, 8)
    assert (short.num_hidden_layers, short.vocab_size, short.hidden_size) == (8, 64_000, 3072)
    assert short.num_parameters() == pytest.approx(config.num_parameters() / 4, rel=1e-3)
    with pytest.raises(ValueError, match="layers is 33"):
        measure.shortened(config, 33)


@pytest.mark.parametrize("kind", KINDS)
def test_other_families_can_be_shortened(kind: str) -> None:
    config = kind_config(kind, num_hidden_layers=4, vocab_size=256, pad_token_id=255)
    short = measure.shortened(config, 2)
    assert (short.model_type, short.num_hidden_layers, short.vocab_size) == (config.model_type, 2, 128)
    assert short.pad_token_id is None
    model = measure.random_model(short, dtype=torch.float32)
    assert len(model.model.layers) == 2
    assert TransformersPeer(model).run([5, 6, 7], 3).tokens
    assert model.last_generation.engine == "transformers"


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr("minitron.loading.load", lambda *_, **__: type("Loaded", (), {"model": tiny_model()}))
    command = ["bench", str(tmp_path), "--prompt-tokens", "5", "-n", "3", "--rounds", "2"]
    picture = tmp_path / "roofline.svg"
    found = CliRunner().invoke(app, [*command, "--json", "--plot", str(picture)])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["tokens_per_s"] > 0
    assert result["peers"]["transformers"]["equal_tokens"] == 3
    assert 0 < result["zero_fraction"] < 1
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    if "llama.cpp" in result["peers"]:
        assert result["peers"]["llama.cpp"]["times"] > 0
    table = CliRunner().invoke(app, [*command, "--peers", "none", "--random-weights", "--layers", "1"])
    assert "1 of 2 layers" in table.stdout
    assert "random, 90% zeros declared" in table.stdout
    assert "of the MLP neurons" in table.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["x", "--preset", "minitron-4b"], "both given"),
        (["--preset", "minitron-5b"], "minitron-5b"),
        (["x", "--rounds", "0"], "--rounds is 0"),
        (["x", "--peers", "vllm"], "--peers is 'vllm'"),
        (["x", "--format", "int3"], "--format is 'int3'"),
        (["x", "--layers", "3"], "--layers was given"),
    ],
)
def test_bench_refuses(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", *options])
    assert done.exit_code == 2
    assert said in done.stderr
