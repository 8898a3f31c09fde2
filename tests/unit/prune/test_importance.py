"""Importance: streamed sums against formulas on the stored activations of a whole model, in float64."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from calibration import batch, documents, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minitron.assets import bundled_model
from minitron.data.documents import DataError, Source
from minitron.data.packing import Batch, PackedBlocks
from minitron.data.token_cache import tokenize
from minitron.prune import streaming
from minitron.prune.importance import check_language, collect_statistics, compute_importance, draw_blocks
from minitron.prune.scores import Scores
from minitron.prune.statistics import AGGREGATIONS, Moments, over_tokens
from minitron.prune.streaming import StreamError, token_counts
from minitron.tokenizer import load_tokenizer

PAIRS = list(product(AGGREGATIONS, AGGREGATIONS))

# The three of P1, section 2.2, as printed; `axis` 0 is what is aggregated over.
DIRECT = {
    "mean": lambda x: np.abs(x).mean(0),
    "l2": lambda x: np.sqrt((x**2).sum(0)),
    "variance": lambda x: ((x - x.mean(0)) ** 2).mean(0),
}


def direct(samples: list[np.ndarray], over_batch: str, over_sequence: str) -> torch.Tensor:
    """The formula on stored activations: one (T, units) array a sample."""
    return torch.from_numpy(DIRECT[over_batch](np.stack([DIRECT[over_sequence](x) for x in samples])))


def stored(model: Any, blocks: Batch) -> dict[str, list[np.ndarray]]:
    """Activations of the whole model at every site, one array a sample, without padding."""
    found: dict[str, torch.Tensor] = {}
    config = model.config

    def keep(name: str, inputs: bool = False) -> Any:
        return lambda _, args, out: found.__setitem__(name, args[0] if inputs else out)

    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(keep(f"{i}.input_norm"))
        layer.post_attention_layernorm.register_forward_hook(keep(f"{i}.post_norm"))
        layer.self_attn.o_proj.register_forward_hook(keep(f"{i}.attention", inputs=True))
        layer.mlp.up_proj.register_forward_hook(keep(f"{i}.before"))
        layer.mlp.down_proj.register_forward_hook(keep(f"{i}.after", inputs=True))
        layer.register_forward_hook(keep(f"{i}.in", inputs=True))
        layer.register_forward_hook(keep(f"{i}.out"))
    model.model.norm.register_forward_hook(keep("norm"))
    with torch.no_grad():
        model(blocks.input_ids, position_ids=blocks.position_ids, use_cache=False)
    for i in range(config.num_hidden_layers):
        heads = found.pop(f"{i}.attention").unflatten(-1, (-1, config.head_dim))
        found[f"{i}.heads"] = heads.norm(dim=-1)
        found[f"{i}.groups"] = heads.unflatten(2, (config.num_key_value_heads, -1)).flatten(3).norm(dim=-1)
    # Padding: what follows the last label.
    ends = [max(j for j, label in enumerate(row) if label != -100) + 1 for row in blocks.labels.tolist()]
    return {name: [x[:n].numpy() for x, n in zip(value, ends, strict=True)] for name, value in found.items()}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(activations of the whole model, what streaming collected from the same checkpoint)."""
    folder = tmp_path_factory.mktemp("model")
    model = saved(folder)
    blocks = batch()
    collected = collect_statistics(folder, blocks, windows=(2, 3), dtype=torch.float64)
    return stored(model, blocks), collected, folder, blocks


@pytest.mark.parametrize(("over_batch", "over_sequence"), PAIRS)
def test_aggregations_are_the_papers_formulas(both: Any, over_batch: Any, over_sequence: Any) -> None:
    kept, collected, _, _ = both
    for neurons in ("before", "after"):
        scores = collected.scores(over_batch, over_sequence, neurons)
        for layer in range(3):
            for axis, site in (("heads", "heads"), ("groups", "groups"), ("neurons", neurons)):
                expected = direct(kept[f"{layer}.{site}"], over_batch, over_sequence)
                torch.testing.assert_close(getattr(scores, axis)[layer], expected, rtol=1e-10, atol=1e-13)
        norms = [*(f"{i}.{name}" for i in range(3) for name in ("input_norm", "post_norm")), "norm"]
        channels = sum(direct(kept[name], over_batch, over_sequence) for name in norms)
        torch.testing.assert_close(scores.channels, channels, rtol=1e-10, atol=1e-13)
        assert scores.about["aggregation"] == [over_batch, over_sequence]


def test_block_influence_of_layers_and_windows(both: Any) -> None:
    kept, collected, _, _ = both
    scores = collected.scores()

    def influence(first: int, last: int) -> float:
        x, y = np.concatenate(kept[f"{first}.in"]), np.concatenate(kept[f"{last}.out"])
        return float(np.mean(1 - (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)))

    assert scores.layers.tolist() == pytest.approx([influence(i, i) for i in range(3)], rel=1e-10)
    assert scores.windows[2].tolist() == pytest.approx([influence(i, i + 1) for i in range(2)], rel=1e-10)
    assert scores.windows[3].tolist() == pytest.approx([influence(0, 2)], rel=1e-10)


def test_loss_on_the_calibration_text_is_the_models(both: Any, tmp_path: Path) -> None:
    _, collected, _, blocks = both
    model = saved(tmp_path / "again")
    with torch.no_grad():
        inputs = {"position_ids": blocks.position_ids, "labels": blocks.labels}
        loss = model(blocks.input_ids, **inputs, use_cache=False).loss
    assert collected.about["loss"] == pytest.approx(loss.item(), rel=1e-5)  # the model's loss is fp32
    assert "nearly that of guessing" in collected.about["notes"][0]  # random weights


@pytest.mark.parametrize("shape", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_other_shapes_and_small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]) -> None:
    model, blocks = saved(tmp_path, **shape), batch()
    monkeypatch.setattr(streaming, "TOKENS_AT_ONCE", 20)  # one block at a time
    found = collect_statistics(tmp_path, blocks, dtype=torch.float64).scores("l2", "variance", "before")
    kept = stored(model, blocks)
    for layer in range(3):
        expected = direct(kept[f"{layer}.before"], "l2", "variance")
        torch.testing.assert_close(found.neurons[layer], expected, rtol=1e-10, atol=1e-13)


def test_fp32_is_float64_to_rounding(both: Any) -> None:
    _, collected, folder, blocks = both
    single = compute_importance(folder, blocks)
    double = collected.scores()
    for axis in ("heads", "groups", "neurons"):
        for ours, theirs in zip(getattr(single, axis), getattr(double, axis), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(single.channels, double.channels, rtol=2e-5, atol=1e-6)


# --- sums that merge ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(-100, 100)), min_size=1, max_size=8), st.data())
@settings(max_examples=60, deadline=None)
def test_moments_merge_in_any_grouping(samples: list[tuple[int, float]], data: st.DataObject) -> None:
    random = np.random.default_rng(len(samples))
    arrays = [random.normal(offset, 1, (tokens, 4)) for tokens, offset in samples]
    ranks = [Moments(4) for _ in range(3)]
    for array in arrays:
        ranks[data.draw(st.integers(0, 2))].add(over_tokens(torch.from_numpy(array)))
    merged = Moments(4)
    for rank in data.draw(st.permutations(ranks)):
        merged = merged + rank
    for over_batch, over_sequence in PAIRS:
        expected = direct(arrays, over_batch, over_sequence)
        torch.testing.assert_close(merged.score(over_batch, over_sequence), expected, rtol=1e-9, atol=1e-9)


def test_variance_of_a_large_mean_is_not_lost() -> None:
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) + 3000
    expected = x.double().var(0, correction=0)
    torch.testing.assert_close(over_tokens(x)[2], expected, rtol=1e-4, atol=0)


def test_unknown_aggregations_are_named() -> None:
    with pytest.raises(ValueError, match="batch aggregation is 'max'; it must be one of mean, l2, variance"):
        Moments(2).score("max", "mean")  # type: ignore[arg-type]


SAMPLES = Path(__file__).parents[2] / "samples"
WORKER = """
import sys, torch
sys.path.insert(0, {samples!r})
from calibration import batch
from minitron.prune.importance import compute_importance
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", f"file://{{folder}}/meeting", rank=rank, world_size=2)
compute_importance(folder + "/model", batch(), dtype=torch.float64).save(f"{{folder}}/{{rank}}.safetensors")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_merged_ranks_equal_one_rank(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    code = WORKER.format(samples=str(SAMPLES))
    commands = [[sys.executable, "-c", code, str(rank), str(tmp_path)] for rank in (0, 1)]
    running = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for command in commands]
    assert [process.wait(120) for process in running] == [0, 0]
    one = compute_importance(tmp_path / "model", batch(), dtype=torch.float64)
    two = [Scores.load(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for scores in two:
        for ours, theirs in zip(scores.neurons + scores.heads, one.neurons + one.heads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        torch.testing.assert_close(scores.channels, one.channels, rtol=1e-12, atol=0)
        torch.testing.assert_close(scores.layers, one.layers, rtol=1e-12, atol=0)
        assert scores.about["tokens"] == one.about["tokens"]
    assert torch.equal(two[0].channels, two[1].channels)


# --- interrupted -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {samples!r})
from pathlib import Path
from calibration import batch
from minitron.prune.importance import compute_importance
def die(done, total):
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
compute_importance(sys.argv[1], batch(), windows=(2,), work=Path(sys.argv[1] + "-work"), progress=die)
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scores]:
    folder = tmp_path_factory.mktemp("model") / "model"
    saved(folder)
    return folder, compute_importance(folder, batch(), windows=(2,))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(("layer", "how"), [(1, "killed"), (2, "raised"), (3, "raised")])
def test_interrupted_and_continued_gives_the_same(uninterrupted: Any, layer: int, how: str) -> None:
    folder, expected = uninterrupted
    work = folder.parent / "model-work"
    if how == "killed":
        code = KILLED.format(samples=str(SAMPLES))
        done = subprocess.run([sys.executable, "-c", code, str(folder), str(layer)], timeout=120)
        assert done.returncode == -signal.SIGKILL
    else:

        def stop(done: int, total: int) -> None:
            if done == layer:
                raise StoppedError

        with pytest.raises(StoppedError):
            compute_importance(folder, batch(), windows=(2,), work=work, progress=stop)
    assert (work / f"layer-{layer - 1}.safetensors").is_file()
    with pytest.raises(StreamError, match=r"belongs to another run \(tokens differ\); delete"):
        compute_importance(folder, batch(seed=5), windows=(2,), work=work)
    seen: list[int] = []
    found = compute_importance(folder, batch(), windows=(2,), work=work, progress=lambda n, _: seen.append(n))
    assert seen == list(range(layer, 4))  # the layer that was being finished is done again, those before it are not
    for axis in ("heads", "groups", "neurons"):
        assert all(map(torch.equal, getattr(found, axis), getattr(expected, axis)))
    assert torch.equal(found.channels, expected.channels)
    assert torch.equal(found.layers, expected.layers)
    assert torch.equal(found.windows[2], expected.windows[2])
    assert found.about == expected.about
    assert not work.exists()


# --- bad input ---------------------------------------------------------------------------------------------------


def test_nan_is_named_by_layer(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    broken = "model.layers.1.mlp.up_proj.weight"
    weights[broken][7] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(StreamError, match=r"layer 1, output of up_proj: NaN or infinity \(unit 7\)"):
        compute_importance(tmp_path, batch())
    weights[broken][7] = 0
    weights["model.layers.2.mlp.down_proj.weight"][3] = float("inf")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(StreamError, match="layer 2: its output has NaN or infinity"):
        compute_importance(tmp_path, batch())


def test_windows_that_cannot_be(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(StreamError, match="windows of 4 layers: it must be 2 to 3"):
        collect_statistics(tmp_path, batch(), windows=(4,))


def test_blocks_are_drawn_without_repetition_and_short_text_is_refused() -> None:
    packed = PackedBlocks(documents(count=40), 20)
    drawn = draw_blocks(packed, 12, seed=1)
    rows = {tuple(row) for row in drawn.input_ids.tolist()}
    assert len(rows) == 12
    assert torch.equal(drawn.input_ids, draw_blocks(packed, 12, seed=1).input_ids)
    assert not torch.equal(drawn.input_ids, draw_blocks(packed, 12, seed=2).input_ids)
    with pytest.raises(DataError, match=rf"too short: it fills {len(packed)} blocks of 20 tokens, 1024 are asked for"):
        draw_blocks(packed, 1024)


def test_tokens_before_padding() -> None:
    labels = torch.tensor([[-100, 4, -100, 5], [-100, 4, -100, -100], [-100, -100, -100, -100]])
    assert token_counts(SimpleNamespace(labels=labels)) == [4, 2, 0]  # type: ignore[arg-type]


TEXTS = {
    "known": "Once upon a time there was a little girl who lived in a small house near the forest. " * 20,
    "unknown": "むかしむかし、あるところに、おじいさんとおばあさんがいました。" * 20,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_language_that_the_tokenizer_does_not_know(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[kind], encoding="utf-8")
    tokenizer: Any = load_tokenizer(bundled_model())
    blocks = draw_blocks(PackedBlocks(tokenize(Source(str(tmp_path / "text.txt")), tokenizer, tmp_path), 64), 4)
    if kind == "known":
        assert check_language(blocks, tokenizer) < 0.01
    else:
        with pytest.raises(DataError, match=r"\d\d% of the calibration tokens are unknown or parts of characters"):
            check_language(blocks, tokenizer)


def test_the_bundled_model_knows_its_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS["known"], encoding="utf-8")
    tokenizer: Any = load_tokenizer(bundled_model())
    blocks = draw_blocks(PackedBlocks(tokenize(Source(str(tmp_path / "text.txt")), tokenizer, tmp_path), 64), 4)
    scores = compute_importance(bundled_model(), blocks)
    assert scores.about["notes"] == []
    assert scores.about["loss"] < 0.9 * math.log(4096)
