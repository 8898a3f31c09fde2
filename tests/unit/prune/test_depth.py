"""Layers left out: streamed figures against a whole model in float64 without these layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration import batch, saved
from torch import nn
from torch.nn import functional as F

from minitron import NemotronForSequenceClassification
from minitron.data.packing import Batch
from minitron.prune import head_loss
from minitron.prune.depth import score_layers
from minitron.prune.importance import compute_importance
from minitron.prune.streaming import StreamedModel, StreamError, Walk

LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("model")
    return saved(folder, num_hidden_layers=LAYERS), folder


def logits_and_loss(model: Any, blocks: Batch, removed: Sequence[int] = ()) -> tuple[torch.Tensor, float]:
    """Logits at scored places, and the mean loss, of the model without some layers."""
    every = model.model.layers
    model.model.layers = nn.ModuleList(layer for i, layer in enumerate(every) if i not in removed)
    try:
        with torch.no_grad():
            logits = model(blocks.input_ids, position_ids=blocks.position_ids, use_cache=False).logits
    finally:
        model.model.layers = every
    targets = blocks.labels[:, 1:]
    scored = targets != -100
    picked = logits[:, :-1][scored]
    return picked, F.cross_entropy(picked, targets[scored]).item()


def distance(model: Any, blocks: Batch, removed: Sequence[int]) -> float:
    whole, _ = logits_and_loss(model, blocks)
    other, _ = logits_and_loss(model, blocks, removed)
    return float((whole - other).square().sum() / whole.square().sum())


@pytest.mark.parametrize("method", ["loss", "distance"])
def test_layers_and_windows(model: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    net, folder = model
    blocks = batch()
    monkeypatch.setattr(head_loss, "HEAD_BLOCK_BYTES", 4 * 32 * 7)  # the head in pieces of 7 rows
    monkeypatch.setattr(head_loss, "_HIDDEN_VALUES", 1)  # 64 tokens at a time
    found = score_layers(folder, blocks, method, windows=(3, 2), dtype=torch.float64)
    _, whole = logits_and_loss(net, blocks)

    def expected(removed: Sequence[int]) -> float:
        if method == "loss":
            return logits_and_loss(net, blocks, removed)[1] - whole
        return distance(net, blocks, removed)

    assert found.about["loss"] == pytest.approx(whole, rel=1e-12)
    assert found.layers.tolist() == pytest.approx([expected([i]) for i in range(4)], rel=1e-9, abs=1e-12)
    assert found.windows[2].tolist() == pytest.approx([expected([i, i + 1]) for i in range(3)], rel=1e-9, abs=1e-12)
    assert found.windows[3].tolist() == pytest.approx([expected(range(i, i + 3)) for i in range(2)], rel=1e-9)


def test_greedy_is_the_order_of_a_search_by_hand(model: Any) -> None:
    net, folder = model
    blocks = batch()
    gone: list[int] = []
    while len(gone) < LAYERS - 1:
        left = [i for i in range(LAYERS) if i not in gone]
        gone.append(min(left, key=lambda i: distance(net, blocks, [*gone, i])))
    last = next(i for i in range(LAYERS) if i not in gone)
    found = score_layers(folder, blocks, "greedy", dtype=torch.float64)
    assert found.layers.argsort().tolist() == [*gone, last]
    assert [layer for layer, _ in found.about["removed"]] == gone
    assert found.about["removed"][1][1] == pytest.approx(distance(net, blocks, gone[:2]), rel=1e-9)
    short = score_layers(folder, blocks, "greedy", remove=1, dtype=torch.float64)
    assert short.layers[gone[0]] == 0
    assert sorted(short.layers.tolist()) == [0, 1, 2, 3]


def test_an_interrupted_search_goes_on(model: Any, tmp_path: Path) -> None:
    _, folder = model
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:  # in the second round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_layers(folder, batch(), "greedy", work=tmp_path / "work", progress=stop)
    assert (tmp_path / "work" / "round-0.json").is_file()
    with pytest.raises(StreamError, match=r"round-0\.json: belongs to another run"):
        score_layers(folder, batch(seed=3), "greedy", work=tmp_path / "work")
    found = score_layers(folder, batch(), "greedy", work=tmp_path / "work")
    expected = score_layers(folder, batch(), "greedy")
    assert torch.equal(found.layers, expected.layers)
    assert found.about == expected.about
    assert not (tmp_path / "work").exists()


def test_streams_in_files_are_those_in_memory(model: Any, tmp_path: Path) -> None:
    _, folder = model
    found = []
    for place in (None, tmp_path):
        walk = Walk(StreamedModel(folder), batch(), [(0, 2), (1,), (0, 3)], place)
        for step in walk.steps():
            assert [key for key in walk.through(step.index) if key and key[-1] >= step.index] == []
            list(step.run())
        found.append({key: store.get(range(walk.count)) for key, store in walk.at.items()})
    assert {(), (0, 2), (1,), (0, 3)} <= found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"walk.json", *(f"stream-4-{'-'.join(map(str, key)) or 'whole'}.bin" for key in found[0])}


def test_in_place_of_block_influence(model: Any) -> None:
    _, folder = model
    scores = compute_importance(folder, batch(), depth="loss", windows=(2,))
    alone = score_layers(folder, batch(), "loss", windows=(2,))
    assert torch.equal(scores.layers, alone.layers)
    assert torch.equal(scores.windows[2], alone.windows[2])
    assert scores.about["depth"] == "loss"


def test_bad_input(model: Any, tmp_path: Path) -> None:
    _, folder = model
    with pytest.raises(StreamError, match="depth is scored by 'size'; it must be one of loss, distance, greedy"):
        score_layers(folder, batch(), "size")
    with pytest.raises(StreamError, match="windows of 4 layers: it must be 2 to 3"):
        score_layers(folder, batch(), windows=(4,))
    with pytest.raises(StreamError, match="depth is 'size'; it must be one of influence, loss"):
        compute_importance(folder, batch(), depth="size")
    net = saved(tmp_path / "one", num_hidden_layers=1)
    with pytest.raises(StreamError, match="has 1 layer; scoring layers by leaving one out needs two"):
        score_layers(tmp_path / "one", batch())
    classifier = NemotronForSequenceClassification(net.config)
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(StreamError, match="has no LM head, so it has no loss"):
        score_layers(tmp_path / "classifier", batch())
    assert compute_importance(tmp_path / "classifier", batch()).about.get("loss") is None
