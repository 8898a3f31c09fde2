"""Scores as a file: what is written comes back, and what is wrong is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import tiny
from safetensors.torch import load_file, save_file

from minitron.checkpoint.limits import CheckpointError
from minitron.prune.plot import plot_scores
from minitron.prune.scores import Scores, ScoresError


def sample(sizes: tuple[int, ...] = (2, 4, 2, 48, 32), **changes: Any) -> Scores:
    layers, heads, groups, neurons, channels = sizes

    def vector(size: int) -> torch.Tensor:
        return torch.rand(size, dtype=torch.float64)

    parts: dict[str, Any] = {
        "heads": [vector(heads) for _ in range(layers)],
        "groups": [vector(groups) for _ in range(layers)],
        "neurons": [vector(neurons) for _ in range(layers)],
        "channels": vector(channels),
        "layers": vector(layers),
        "windows": {2: vector(layers - 1)} if layers > 1 else {},
        "about": {"aggregation": ["l2", "mean"], "blocks": 3},
    }
    return Scores(**{**parts, **changes})


@given(st.tuples(*[st.integers(1, 6)] * 5))
@settings(max_examples=25, deadline=None)
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, sizes: tuple[int, ...]) -> None:
    path = tmp_path_factory.mktemp("scores") / "importance.safetensors"
    scores = sample(sizes)
    scores.save(path)
    found = Scores.load(path)
    for axis in ("heads", "groups", "neurons"):
        for ours, theirs in zip(getattr(scores, axis), getattr(found, axis), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(found.channels, scores.channels)
    assert torch.equal(found.layers, scores.layers)
    assert found.windows.keys() == scores.windows.keys()
    assert all(torch.equal(found.windows[n], scores.windows[n]) for n in scores.windows)
    assert found.about == scores.about
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert load_file(path)["channels"].dtype == torch.float64  # readable by others


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": torch.ones(32)}, "channels: found torch.float32 of shape .32., expected one dimension"),
        ({"layers": torch.tensor([1.0, float("nan")], dtype=torch.float64)}, "layers: score 1 is nan"),
        ({"heads": [torch.ones(4, dtype=torch.float64)]}, "heads: scores of 1 layers, expected 2"),
        ({"windows": {2: torch.ones(5, dtype=torch.float64)}}, "windows of 2 layers: 5 scores, expected 1"),
    ],
)
def test_what_cannot_be_scores(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoresError, match=message):
        sample(**changes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hidden_layers": 3}, "of 2 layers, the model has 3"),
        ({"intermediate_size": 64}, "layer 0 are of 48 neurons, the model has 64"),
        ({"num_attention_heads": 2, "head_dim": 16}, "layer 0 are of 4 heads, the model has 2"),
        ({"num_key_value_heads": 1}, "layer 0 are of 2 groups, the model has 1"),
        ({"hidden_size": 64}, "32 channels, the model has 64"),
    ],
)
def test_another_shape_is_refused(overrides: dict[str, Any], message: str) -> None:
    sample().check_fits(tiny())
    with pytest.raises(ScoresError, match=message):
        sample().check_fits(tiny(**overrides))


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "importance.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        Scores.load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ScoresError, match="has no importance scores"):
        Scores.load(path)
    save_file({"x": torch.ones(2)}, path, metadata={"minitron": json.dumps({"format": "minitron-importance-9"})})
    with pytest.raises(ScoresError, match="format is 'minitron-importance-9', expected"):
        Scores.load(path)
    sample().save(path)
    content, whole = load_file(path), path.read_bytes()
    header = {"format": "minitron-importance-1", "num_layers": 2, "about": {}}
    content.pop("neurons.1")
    save_file(content, path, metadata={"minitron": json.dumps(header)})
    with pytest.raises(ScoresError, match=r"no tensor 'neurons\.1'; the file is incomplete"):
        Scores.load(path)
    path.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="the file is cut"):
        Scores.load(path)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 48, 32), (3, 2, 1, 2000, 5)])
def test_a_plot_shows_every_layer(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    pytest.importorskip("matplotlib")
    plot_scores(sample(sizes), tmp_path / "scores.svg")
    text = (tmp_path / "scores.svg").read_text()
    assert text.count("<image") >= 3  # heat maps
    plot_scores(sample(sizes, windows={}, about={}), tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 10_000


def test_what_a_plot_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"plots need matplotlib: pip install 'minitron\[plot\]'"):
        plot_scores(sample(), tmp_path / "scores.png")
