"""Which files of a Hugging Face folder hold the weights, and their tensors, none of them read yet.

A folder may hold several sets: one file, shards with an index, `pytorch_model.bin`. Every reader here takes the one
that transformers takes, in this order, and says which others lie there: a stale set must not be read unnoticed.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .limits import MAX_TENSORS, CheckpointError, file_inside, member_path, read_json, require, shown
from .safetensors_io import read_safetensors
from .tensors import ByteRange, LazyTensor
from .torch_file import TorchFile, state_dict_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ORDER = (SINGLE, INDEX, BIN, BIN_INDEX)  # of transformers' _get_resolved_checkpoint_files


class WeightFiles(NamedTuple):
    """The file that leads to the weights of a folder, and what else lies there."""

    path: Path
    notes: list[str]


def find_weights(folder: Path) -> WeightFiles | None:
    """The weights that count in a folder; None if there are none under the usual names."""
    found = [name for name in _ORDER if (folder / name).is_file()]
    if not found:
        return None
    notes = [f"{folder}: read from {found[0]}; {' and '.join(found[1:])} beside it not used"] if found[1:] else []
    return WeightFiles(folder / found[0], notes)


def read_tensors(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of a folder, of one file or of the shards that the index names; none of them read yet.

    Raises:
        CheckpointError: no weights, a missing shard, a tensor that is not where the index says, a cut file.
    """
    weights = find_weights(folder)
    if weights is None:
        others = sorted(path.name for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")])[:3]
        hint = f"; {', '.join(others)} would have to be renamed" if others else ""
        raise CheckpointError(f"{folder}: none of {', '.join(_ORDER[:3])} in it; expected the weights{hint}")
    if weights.path.name in (INDEX, BIN_INDEX):
        return _read_shards(folder, weights.path)
    return _read_file(weights.path)


def _read_file(path: Path) -> dict[str, LazyTensor]:
    """One file of weights: safetensors, or what torch.save wrote (read as data, no code in it is run)."""
    if path.suffix == ".bin":
        return dict(state_dict_of(TorchFile(ByteRange.whole(path))))
    return read_safetensors(path)


def _read_shards(folder: Path, index: Path) -> dict[str, LazyTensor]:
    places = read_json(index).get("weight_map")
    good = isinstance(places, dict) and all(isinstance(place, str) for place in places.values())
    require(good, f"{index}: weight_map is missing or not a map from tensor to file")
    assert isinstance(places, dict)
    require(len(places) <= MAX_TENSORS, f"{index}: {len(places):,} tensors, expected at most {MAX_TENSORS:,}")
    suffix = ".bin" if index.name == BIN_INDEX else ".safetensors"
    shards: dict[PurePosixPath, dict[str, LazyTensor]] = {}
    owners: dict[str, str] = {}
    for place in dict.fromkeys(places.values()):
        inside = member_path(place, index)
        if inside in shards:
            continue
        require(inside.suffix == suffix, f"{index}: names {shown(place)}, expected files that end in {suffix}")
        path = file_inside(folder, place, index)
        require(path.is_file(), f"{index}: names {place}, which is not in {folder}; a shard is missing")
        shards[inside] = _read_file(path)
        # Readers that open every shard whole would take whichever comes last.
        twice = next((name for name in shards[inside] if name in owners), None)
        if twice is not None:
            raise CheckpointError(f"{path}: holds {twice}, as {owners[twice]} does; expected it in one shard")
        owners.update((name, str(place)) for name in shards[inside])
    found = {}
    for name, place in places.items():
        shard = shards[PurePosixPath(place)]
        if name not in shard:
            raise CheckpointError(f"{folder / place}: no tensor {name}, which {index.name} says is there")
        found[name] = shard[name]
    return found


def check_index(folder: Path) -> None:
    """Look at what transformers needs of an index besides the map.

    Raises:
        CheckpointError: no `metadata`, or not a map.
    """
    weights = find_weights(folder)
    if weights is not None and weights.path.name in (INDEX, BIN_INDEX):
        about = read_json(weights.path).get("metadata")
        good = isinstance(about, dict)
        require(good, f'{weights.path}: metadata is {shown(about)}, expected a map such as {{"total_size": 123}}')
