"""Which layers matter: the model without them, measured.

All variants of one round walk through the checkpoint together: each layer's weights are read once a round. Block
Influence, which needs no variant, is part of the pass of `importance`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.fingerprint import fingerprint
from ..data.packing import Batch
from ..files import write_text
from ..world import World, current_world
from .head_loss import Judged, judge
from .streaming import Removed, StreamedModel, StreamError, Walk, batch_digest, own_blocks, workplace

DEPTH_METHODS = ("loss", "distance", "greedy")

Progress = Callable[[int, int], None]
"""Called with (layers done, layers)."""


@dataclass(frozen=True)
class LayerScores:
    """Scores of layers and of contiguous windows of them, higher for more important; see `Scores`."""

    layers: Tensor
    windows: dict[int, Tensor]
    about: dict[str, Any]


def score_layers(
    folder: str | Path,
    blocks: Batch,
    method: str = "loss",
    *,
    windows: Sequence[int] = (),
    remove: int | None = None,
    work: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    world: World | None = None,
) -> LayerScores:
    """Score layers by the effect of removing them. Costs about half a forward pass for each layer of the model.

    Args:
        folder: checkpoint of a causal language model in the Hugging Face layout.
        blocks: calibration blocks (B, T).
        method: "loss": by how much the loss rises without the layer, in nats (perplexity is its exponential; P1,
            arXiv 2407.14679); "distance": normalized squared difference of the logits (arXiv 2511.16664); "greedy":
            removes the layer whose loss changes the logits least, again and again (arXiv 2508.14444); the score is the
            rank in that order.
        windows: numbers of contiguous layers to score too, by loss for "loss" and by distance otherwise.
        remove: rounds of "greedy"; layers that remain are ordered by the last round. All if None.
        work, dtype, device, progress, world: as of `importance.collect_statistics`.

    Raises:
        CheckpointError, StreamError: the checkpoint cannot be read, or has no LM head; `work` holds another run.
    """
    if method not in DEPTH_METHODS:
        raise StreamError(f"depth is scored by {method!r}; it must be one of {', '.join(DEPTH_METHODS)}")
    model = StreamedModel(Path(folder), dtype, device)
    model.head()
    total = model.config.num_hidden_layers
    if total < 2:
        raise StreamError(f"the model has {total} layer; scoring layers by leaving one out needs two at least")
    for length in windows:
        if not 2 <= length < total:
            raise StreamError(f"windows of {length} layers: it must be 2 to {total - 1}, fewer than the model's layers")
    judgements = _Judgements(model, blocks, fingerprint(Path(folder)), work, progress, world or current_world())
    spans = [tuple(range(i, i + n)) for n in sorted({1, *windows}) for i in range(total + 1 - n)]
    whole, found = judgements.of(spans)
    about: dict[str, Any] = {"depth": method, "loss": whole.loss}
    value = {span: j.loss - whole.loss if method == "loss" else j.distance for span, j in found.items()}
    scores = {
        n: torch.tensor([value[span] for span in spans if len(span) == n], dtype=torch.float64) for n in {1, *windows}
    }
    if method == "greedy":
        order, scores[1] = _greedy(judgements, found, total, min(remove or total - 1, total - 1))
        about["removed"] = order
    judgements.forget()
    return LayerScores(scores.pop(1), scores, about)


def _greedy(
    judgements: _Judgements, first: dict[Removed, Judged], total: int, remove: int
) -> tuple[list[list[float]], Tensor]:
    """[layer, distance once it is gone] in the order of removal, and each layer's rank in it."""
    order: list[list[float]] = []
    gone: list[int] = []
    distance: dict[int, float] = {}
    for _ in range(remove):
        left = [layer for layer in range(total) if layer not in gone]
        variants = {layer: tuple(sorted((*gone, layer))) for layer in left}
        found = judgements.of(list(variants.values()))[1] if gone else first
        distance = {layer: found[removed].distance for layer, removed in variants.items()}
        least = min(left, key=lambda layer: (distance[layer], layer))
        gone.append(least)
        order.append([least, distance[least]])
    rest = sorted((layer for layer in range(total) if layer not in gone), key=lambda layer: distance[layer])
    scores = torch.zeros(total, dtype=torch.float64)
    scores[[*gone, *rest]] = torch.arange(total, dtype=torch.float64)
    return order, scores


class _Judgements:
    """Rounds of variants, each walked once; a work folder keeps finished rounds."""

    def __init__(
        self,
        model: StreamedModel,
        blocks: Batch,
        checkpoint: str,
        work: Path | None,
        progress: Progress | None,
        world: World,
    ) -> None:
        self.model, self.blocks, self.checkpoint, self.progress = model, own_blocks(blocks, world), checkpoint, progress
        self.world, self.work, self.rounds = world, world.own_folder(work), 0

    def of(self, variants: list[Removed]) -> tuple[Judged, dict[Removed, Judged]]:
        """The whole model, and each variant."""
        path = None if self.work is None else self.work / f"round-{self.rounds}.json"
        identity: dict[str, Any] = {"checkpoint": self.checkpoint, "variants": [list(v) for v in variants]}
        identity["calibration"] = batch_digest(self.blocks)
        self.rounds += 1
        rows = self._remembered(path, identity)
        if rows is None:
            mine = self._walk(variants)
            rows = [[j.tokens, j.nats, j.squared_difference, j.squares] for j in mine.values()]
            if path is not None:
                write_text(path, json.dumps({"identity": identity, "sums": rows}))
        whole, *rest = (self.world.add_up(Judged(*row)) for row in rows)
        return whole, dict(zip(variants, rest, strict=True))

    def _walk(self, variants: list[Removed]) -> dict[Removed, Judged]:
        work = None if self.work is None else self.work / "depth"
        with workplace(self.model, self.blocks, work, len(variants) + 2) as place:
            walk = Walk(self.model, self.blocks, variants, place, {"checkpoint": self.checkpoint})
            for step in walk.steps():
                for _ in step.run():
                    pass
                if self.progress is not None:
                    self.progress(step.index + 1, self.model.config.num_hidden_layers)
            return judge(walk, variants)

    @staticmethod
    def _remembered(path: Path | None, identity: dict[str, Any]) -> list[list[Any]] | None:
        if path is None or not path.exists():
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            same, rows = saved["identity"] == identity, saved["sums"]
        except (ValueError, KeyError, TypeError) as error:
            raise StreamError(f"{path}: cannot be read ({error}); delete it to start again") from None
        if not same:
            raise StreamError(f"{path}: belongs to another run; delete it to start again")
        return rows

    def forget(self) -> None:
        """Delete the finished rounds."""
        if self.work is not None:
            for path in self.work.glob("round-*.json"):
                path.unlink()
            if self.work.is_dir() and not any(self.work.iterdir()):
                self.work.rmdir()
