"""Importance of heads, groups, neurons, channels and layers, from one forward-only pass over calibration text.

The model is read layer by layer (`streaming`), every unit's activations are summed up where P1 says (`observe`), and
any pair of aggregations turns the sums into scores. With a work folder the pass survives being killed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..checkpoint.fingerprint import fingerprint
from ..data.documents import DataError
from ..data.packing import Batch, PackedBlocks, collate
from ..files import new_file
from ..world import World, current_world
from .depth import DEPTH_METHODS, Progress, score_layers
from .head_loss import Judged, judge
from .observe import LayerStatistics, Statistics, turning, watching
from .scores import Scores
from .statistics import Aggregation
from .streaming import Step, StreamedModel, StreamError, Walk, batch_digest, own_blocks, token_counts, workplace

PROBE_TOKENS = 512
MOST_UNKNOWN = 0.2
"""Share of tokens that are unknown, or pieces of characters, above which a text is not in the tokenizer's language."""


def draw_blocks(blocks: PackedBlocks, count: int, seed: int = 0) -> Batch:
    """`count` blocks drawn at random without repetition, as one batch. P1 draws 1024 samples.

    Raises:
        DataError: the text has fewer.
    """
    if count < 1:
        raise DataError(f"calibration blocks: {count} asked for; it must be at least 1")
    if len(blocks) < count:
        raise DataError(
            f"the calibration text is too short: it fills {len(blocks)} blocks of {blocks.block} tokens, {count} are "
            f"asked for; give more text or ask for fewer or shorter blocks"
        )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count]
    return collate([blocks.pieces(i) for i in order.tolist()], blocks.block)


def check_language(blocks: Batch, tokenizer: Any) -> float:
    """Share of tokens that are unknown or hold only a part of a character (byte fallback).

    Raises:
        DataError: it is so high that the tokenizer does not know the language of the text.
    """
    rows = [row[:count] for row, count in zip(blocks.input_ids, token_counts(blocks), strict=True)]
    ids, occurrences = torch.cat(rows).unique(return_counts=True)
    pieces = tokenizer.batch_decode([[i] for i in ids.tolist()])
    strange = [
        "\ufffd" in piece or token == getattr(tokenizer, "unk_token_id", None)
        for token, piece in zip(ids.tolist(), pieces, strict=True)
    ]
    share = float(occurrences[torch.tensor(strange)].sum() / occurrences.sum())
    if share > MOST_UNKNOWN:
        raise DataError(
            f"{share:.0%} of the calibration tokens are unknown or parts of characters: the tokenizer does not know "
            f"the language of this text; calibrate on text of the kind that the model was trained on"
        )
    return share


def collect_statistics(
    folder: str | Path,
    blocks: Batch,
    *,
    windows: Sequence[int] = (),
    work: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    world: World | None = None,
) -> Statistics:
    """One pass over calibration blocks: the sums from which scores follow. Memory: about one layer in `dtype`.

    Each process of `world` takes its share of the blocks, and all get the same statistics.

    Args:
        folder: checkpoint in the Hugging Face layout.
        blocks: (B, T); one row is one sample.
        windows: numbers of contiguous layers to score besides single ones.
        work: folder in which the pass can be continued after it was killed; emptied at the end.
        dtype: of the computation, torch.float32 or torch.float64.
        device: where layers run.
        progress: called after each layer.
        world: the processes that share the work and all call this; those of torch.distributed, if it is initialised,
            by default. `World()` works alone.

    Raises:
        CheckpointError, StreamError: the checkpoint cannot be read; activations are not finite (the layer is named);
            `work` holds another run.
    """
    folder = Path(folder)
    model = StreamedModel(folder, dtype, device)
    total = model.config.num_hidden_layers
    for length in windows:
        if not 2 <= length <= total:
            raise StreamError(f"windows of {length} layers: it must be 2 to {total}, the model's layers")
    about = {"checkpoint": fingerprint(folder), "calibration": batch_digest(blocks), "blocks": len(blocks.input_ids)}
    world = world or current_world()
    blocks = own_blocks(blocks, world)
    with workplace(model, blocks, world.own_folder(work)) as place:
        mine, judged = _pass(model, blocks, tuple(sorted(set(windows))), place, about, progress)
    found = world.add_up(mine)
    if judged is not None:
        found.about["loss"] = world.add_up(judged).loss
    found.about["notes"] = _notes(found.about)
    return found


def compute_importance(
    folder: str | Path,
    blocks: Batch,
    *,
    batch: Aggregation = "l2",
    sequence: Aggregation = "mean",
    neurons: str = "after",
    depth: str = "influence",
    windows: Sequence[int] = (),
    work: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    world: World | None = None,
) -> Scores:
    """Scores of every axis from one forward-only pass; layers by more passes, if asked for.

    Args:
        folder: checkpoint in the Hugging Face layout.
        blocks: calibration blocks (B, T), for instance of `draw_blocks`.
        batch, sequence: aggregation over samples and over the tokens of one: "mean" (of absolute values), "l2" or
            "variance". P1's best pair is the default.
        neurons: score neurons "before" or "after" the activation.
        depth: what a layer is judged by: "influence" (Block Influence, no further pass), or "loss", "distance" or
            "greedy" of `depth.score_layers`.
        windows, work, dtype, device, progress, world: see `collect_statistics`.
    """
    if depth not in ("influence", *DEPTH_METHODS):
        raise StreamError(f"depth is {depth!r}; it must be one of influence, {', '.join(DEPTH_METHODS)}")
    options: dict[str, Any] = {"dtype": dtype, "device": device, "progress": progress, "world": world}
    by_influence = depth == "influence"
    statistics = collect_statistics(folder, blocks, windows=windows if by_influence else (), work=work, **options)
    scores = statistics.scores(batch, sequence, neurons, depth=depth)
    if by_influence:
        return scores
    layers = score_layers(folder, blocks, depth, windows=windows, work=work, **options)
    return replace(scores, layers=layers.layers, windows=layers.windows, about={**scores.about, **layers.about})


def _pass(
    model: StreamedModel,
    blocks: Batch,
    windows: tuple[int, ...],
    work: Path | None,
    about: dict[str, Any],
    progress: Progress | None,
) -> tuple[Statistics, Judged | None]:
    total = model.config.num_hidden_layers
    identity = {"checkpoint": about["checkpoint"], "windows": list(windows)}
    walk = Walk(model, blocks, folder=work, identity=identity, keep=max(windows, default=1) - 1)
    counts = token_counts(blocks)
    layers = [_read(work, index) for index in range(walk.done)]
    for step in walk.steps():
        layers.append(_one_layer(walk, step, counts, (1, *windows)))
        if work is not None:
            with new_file(_file(work, step.index), overwrite=True) as draft:
                save_file(layers[-1].state(), draft)
        if progress is not None:
            progress(step.index + 1, total)
    final = LayerStatistics()
    norm = model.norm()
    for rows in walk.groups:
        for block, normed in zip(rows, norm(walk.at[()].get(rows).to(model.device)), strict=True):
            if counts[block]:
                final.add("norm", normed[: counts[block]], "output of the final norm")
    judged = judge(walk, at_most=PROBE_TOKENS)[()] if model.has_head else None
    return Statistics(layers, final, sum(counts), {**about, "vocabulary": model.config.vocab_size}), judged


def _one_layer(walk: Walk, step: Step, counts: list[int], lengths: Sequence[int]) -> LayerStatistics:
    found = LayerStatistics(influence={n: 0.0 for n in lengths if n <= step.index + 1})
    with watching(step, counts, found):
        for rows, before, after in step.run():
            here = counts[rows.start : rows.stop]
            for length in found.influence:
                earlier = before if length == 1 else walk.earlier[1 - length].get(rows).to(before.device)
                found.influence[length] += turning(earlier, after, here)
    return found


def _file(work: Path, index: int) -> Path:
    return work / f"layer-{index}.safetensors"


def _read(work: Path | None, index: int) -> LayerStatistics:
    assert work is not None
    return LayerStatistics.from_state(load_file(_file(work, index)))


def _notes(about: Mapping[str, Any]) -> list[str]:
    """What the user should know before relying on the scores."""
    notes = []
    loss, uniform = about.get("loss"), math.log(about["vocabulary"])
    if loss is not None and loss > 0.9 * uniform:
        notes.append(
            f"the model's loss on the calibration text is {loss:.2f} nats per token, nearly that of guessing "
            f"({uniform:.2f}): the text is of a language or kind that the model does not know, or it is not trained"
        )
    return notes
