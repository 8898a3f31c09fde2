"""The cut: a checkpoint and a plan to a smaller checkpoint, tensor by tensor. No model is built.

Every tensor of the result is a lazy selection of rows and columns of one tensor of the source, so memory is a few
blocks whatever the size of the model. Norm weights, zero-centred or not, are selected like any other; the statistics of
a norm are then taken over the channels that stay.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.hf import DEFAULT_SHARD_BYTES, open_hf, write_hf
from ..checkpoint.limits import require
from ..checkpoint.tensors import ByteRange, Checkpoint, LazyTensor
from ..families import Family
from ..files import check_target
from ..shapes import describe
from .plan import LayerPlan, PlanError, PrunePlan

Axis = str | None

# Heads of the classification models; the other parameters are in `families`.
_OTHER_HEADS = ("score", "qa_outputs")
_CUT: dict[str | None, Axis] = {"channels": "channels", "queries": "queries", "keys": "keys", "neurons": "neurons"}
"""Axes that a plan cuts; vocabulary and the channels of a head stay."""
_PARAMETER = re.compile(r"(?:model\.|transformer\.)?(?:layers\.(\d{1,5})\.)?(.+)\.(weight|bias)")
_BUFFER = re.compile(r".*rotary_emb\.(?:original_)?inv_freq")
_LAYER_NUMBER = re.compile(r"(?<=layers\.)\d+")

GAP_BYTES = 1 << 16
"""Two rows that stay are read together if fewer bytes than this lie between them: cheaper than another read."""


@dataclass(frozen=True)
class SurgeryReport:
    """What `prune_checkpoint` did."""

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    seconds: float
    """Of the cut itself, without the check of the source's fingerprint."""


def prune_checkpoint(
    source: Path,
    out: Path,
    plan: PrunePlan,
    *,
    files: Mapping[str, Path] | None = None,
    texts: Mapping[str, str] | None = None,
    overwrite: bool = False,
    check_source: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int], object] = lambda _: None,
) -> SurgeryReport:
    """Carry out `plan` on the Hugging Face folder `source` and write the folder `out`, all or nothing.

    Tokenizer and generation files are copied. Dtypes stay. Memory: a few blocks of a tensor (about one tensor where a
    plan moves rows around).

    Args:
        source: any checkpoint of a family in `families`, of a causal, classification or question answering model,
            sharded or not.
        out: must not exist, or be empty, unless `overwrite`.
        plan: made for `source`.
        files: further files to put into `out`: name to where it is.
        texts: further files to put into `out`: name to content.
        overwrite: replace `out` if it is there.
        check_source: compare the fingerprint of `source` with the plan's, which reads every byte once.
        max_shard_bytes: largest file of weights.
        progress: is called with the number of bytes of each block that is written.

    Raises:
        PlanError: the plan is for another checkpoint.
        CheckpointError: `source` cannot be read or has a tensor that no plan covers.
        TargetError: `out` is there already, overlaps with what is read, or holds files that were not written here.
        WriteError: no room on the disk.
    """
    check_target(out, folder=True, overwrite=overwrite, sources=[source, *(files or {}).values()])
    checkpoint = open_hf(source)
    plan.check_config(checkpoint.config, source)
    if check_source:
        check_fingerprint(source, plan)
    smaller = pruned(checkpoint, plan)
    smaller.files |= {name: ByteRange.whole(path) for name, path in (files or {}).items()}
    smaller.texts |= dict(texts or {})
    watched = replace(smaller, tensors={name: _counted(x, progress) for name, x in smaller.tensors.items()})
    begin = time.perf_counter()
    write_hf(watched, out, max_shard_bytes=max_shard_bytes, overwrite=overwrite)
    seconds = time.perf_counter() - begin
    return SurgeryReport(
        parameters(checkpoint), parameters(smaller), checkpoint.nbytes, smaller.nbytes, round(seconds, 3)
    )


def check_fingerprint(source: Path, plan: PrunePlan) -> None:
    """Refuse a plan that was made for other weights than those in `source`.

    Raises:
        PlanError: names both fingerprints.
    """
    found = fingerprint(source)
    if found != plan.source:
        raise PlanError(
            f"the plan was made for the checkpoint {plan.source[:12] or '(none)'}, {source} is {found[:12]}: "
            f"other weights"
        )


def parameters(checkpoint: Checkpoint) -> int:
    """Number of values in all tensors; a tied matrix that is stored twice counts once."""
    tied = checkpoint.config.tie_word_embeddings
    return sum(
        x.nbytes // x.dtype.itemsize
        for name, x in checkpoint.tensors.items()
        if not (tied and name == "lm_head.weight")
    )


def pruned(checkpoint: Checkpoint, plan: PrunePlan) -> Checkpoint:
    """The smaller model as a checkpoint whose tensors are cut out of those of `checkpoint` when they are read.

    Raises:
        PlanError: the plan is for another shape.
        CheckpointError: a tensor whose dimensions the plan does not know.
    """
    plan.check_config(checkpoint.config, "the checkpoint")
    config = plan.target.config(checkpoint.config)
    shape = describe(config)
    family, head_dim = shape.family, shape.head_dim
    channels = {"channels": np.array(plan.channels)}
    kept = {entry.layer: {**channels, **_indices(entry, head_dim)} for entry in plan.layers}
    numbers = {entry.layer: number for number, entry in enumerate(plan.layers)}
    tensors: dict[str, LazyTensor] = {}
    for name, source in checkpoint.tensors.items():  # in the order of the source's files, which are read from the start
        layer, axes = _read_name(name, family)
        if layer is None:
            tensors[name] = _cut(source, axes, channels)
        elif layer in numbers:
            tensor = _cut(source, axes, kept[layer])
            if axes[0] == "queries":
                tensor = _merged(tensor, source, kept[layer], plan.layers[numbers[layer]], head_dim)
            tensors[_LAYER_NUMBER.sub(str(numbers[layer]), name, count=1)] = tensor
    return replace(checkpoint, config=config, tensors=tensors, files=dict(checkpoint.files), texts={**checkpoint.texts})


def _read_name(name: str, family: Family) -> tuple[int | None, tuple[Axis, Axis]]:
    """The layer that a parameter belongs to, and what its rows and columns are: axes of the plan; None stays whole.

    A bias has the rows of its matrix.
    """
    if _BUFFER.fullmatch(name):  # rotary frequencies in files of old versions: heads keep their width, so these stay
        found = _LAYER_NUMBER.search(name)
        return int(found[0]) if found else None, (None, None)
    match = _PARAMETER.fullmatch(name)
    axes = match and _axes(match[2], match[1] is not None, family)
    require(
        axes,
        f"{name}: not a parameter of a {family.title} model; it is not known which of its values a plan removes",
    )
    assert match is not None
    assert axes is not None
    return None if match[1] is None else int(match[1]), axes


def _axes(module: str, in_layer: bool, family: Family) -> tuple[Axis, Axis] | None:
    """The axes of a module's rows and columns, by its name below the layer or below the backbone."""
    if not in_layer and module in _OTHER_HEADS:
        return None, "channels"
    for part in family.parts:
        if module == part.name.removeprefix("model.") and (part in family.layer) == in_layer:
            return _CUT.get(part.rows), _CUT.get(part.columns)
    return None


def _indices(layer: LayerPlan, head_dim: int) -> dict[str, np.ndarray]:
    return {
        "queries": _of_heads(layer.heads, head_dim),
        "keys": _of_heads(layer.groups, head_dim),
        "neurons": np.array(layer.neurons),
    }


def _of_heads(heads: Sequence[int], head_dim: int) -> np.ndarray:
    return (np.array(heads)[:, None] * head_dim + np.arange(head_dim)).reshape(-1)


def _cut(tensor: LazyTensor, axes: tuple[Axis, Axis], kept: Mapping[str, np.ndarray]) -> LazyTensor:
    rows, columns = (kept[axis] if axis else None for axis in axes)
    return select(tensor, rows, columns if len(tensor.shape) > 1 else None)  # a bias or a norm has rows only


# --- selection on lazy tensors ---------------------------------------------------------------------------------------


def select(tensor: LazyTensor, rows: np.ndarray | None, columns: np.ndarray | None) -> LazyTensor:
    """`tensor[rows][:, columns]`, read when asked for; None is everything."""
    if rows is not None and np.array_equal(rows, np.arange(tensor.shape[0])):
        rows = None
    if columns is not None and np.array_equal(columns, np.arange(tensor.shape[1])):
        columns = None
    if rows is None and columns is None:
        return tensor
    shape = list(tensor.shape)
    if rows is not None:
        shape[0] = len(rows)
    if columns is not None:
        shape[1] = len(columns)

    def read(start: int, stop: int) -> torch.Tensor:
        block = tensor.rows(start, stop) if rows is None else _gather(tensor, rows[start:stop])
        return block if columns is None else _take(block, columns, axis=1)

    return LazyTensor(tuple(shape), tensor.dtype, read)


def _gather(tensor: LazyTensor, rows: np.ndarray) -> torch.Tensor:
    """Rows in any order, by few reads: neighbours together, each row once."""
    ordered, inverse = np.unique(rows, return_inverse=True)
    row_bytes = max(1, tensor.nbytes // max(1, tensor.shape[0]))
    far = np.flatnonzero(np.diff(ordered) > 1 + GAP_BYTES // row_bytes) + 1
    pieces = []
    for run in np.split(ordered, far):
        block = tensor.rows(int(run[0]), int(run[-1]) + 1)
        pieces.append(block if len(run) == len(block) else _take(block, run - run[0], axis=0))
    found = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return found if np.array_equal(inverse, np.arange(len(rows))) else _take(found, inverse, axis=0)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _take(block: torch.Tensor, index: np.ndarray, axis: int) -> torch.Tensor:
    """`index_select`; NumPy's is four times as fast along columns of 16 bits."""
    data = block.contiguous().view(_INTEGERS[block.dtype.itemsize]).numpy()
    return torch.from_numpy(np.take(data, index, axis=axis)).view(block.dtype)


def _merged(
    kept: LazyTensor, source: LazyTensor, indices: Mapping[str, np.ndarray], layer: LayerPlan, head_dim: int
) -> LazyTensor:
    """Query rows of a head that stays as twice its own less those of the head that is merged into it."""
    if not layer.merge:
        return kept
    columns = indices["channels"] if len(source.shape) == 2 else None
    stays = [layer.heads.index(head) for head, _ in layer.merge]
    at = _of_heads(stays, head_dim)
    gone = select(source, _of_heads([head for _, head in layer.merge], head_dim), columns)
    order = np.argsort(at)
    at = at[order]
    exact = torch.float64 if kept.dtype == torch.float64 else torch.float32

    def read(start: int, stop: int) -> torch.Tensor:
        block = kept.rows(start, stop).clone()
        first, last = np.searchsorted(at, (start, stop))
        for index, row in zip(at[first:last], order[first:last], strict=True):
            own, other = block[index - start].to(exact), gone.rows(int(row), int(row) + 1)[0].to(exact)
            block[index - start] = (2 * own - other).to(kept.dtype)
        return block

    return LazyTensor(kept.shape, kept.dtype, read)


def _counted(tensor: LazyTensor, progress: Callable[[int], object]) -> LazyTensor:
    def read(start: int, stop: int) -> torch.Tensor:
        block = tensor.rows(start, stop)
        progress(block.nbytes)
        return block

    return LazyTensor(tensor.shape, tensor.dtype, read)
