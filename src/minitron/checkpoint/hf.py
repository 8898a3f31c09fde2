"""Hugging Face folders: checked, read lazily, written as a stream.

`check_checkpoint` looks at headers only and is cheap; `open_hf` returns lazy tensors; `write_hf` writes shards of
bounded size, with an index, into a temporary folder that is renamed when everything is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.config import NemotronConfig
from minitron.files import new_folder, require_space, writing

from .limits import (
    MAX_TENSORS,
    CheckpointError,
    check_config_numbers,
    file_inside,
    read_json,
    require,
)
from .names import hf_shapes
from .safetensors_io import read_safetensors, write_safetensors
from .tensors import ByteRange, Checkpoint, LazyTensor, write_all
from .torch_file import TorchFile, state_dict_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def check_checkpoint(folder: Path) -> None:
    """Say in one sentence what is wrong with a Hugging Face folder, if anything is. Reads headers only.

    Raises:
        CheckpointError: no folder or config.json; another architecture; a safetensors file that is missing, cut or
            corrupted; a shard that the index names but is not there; a missing tensor or one of another shape than
            config.json says.
    """
    config = read_config(folder)
    tensors = read_tensors(folder)
    if getattr(config, "quantization_config", None) is None:
        check_shapes(config, tensors, folder)


def read_config(folder: Path) -> NemotronConfig:
    """The configuration of the model in `folder`, old spellings (`rope_percent`, `kv_channels`, ...) included.

    Raises:
        CheckpointError: missing or not JSON; another architecture; values that cannot be.
    """
    require(folder.exists(), f"{folder}: no such folder")
    require(folder.is_dir(), f"{folder}: not a folder; expected a Hugging Face checkpoint with config.json in it")
    path = folder / "config.json"
    require(path.is_file(), f"{folder}: no config.json in it; expected a Hugging Face checkpoint")
    return read_config_file(path)


def read_config_file(path: Path) -> NemotronConfig:
    """The configuration in a JSON file of any name.

    Raises:
        CheckpointError: not JSON; another architecture; values that cannot be.
    """
    values = read_json(path)
    found = values.get("model_type")
    require(found == "nemotron", f"{path}: model_type is {found!r}, expected 'nemotron'; this is another architecture")
    return config_from(values, path)


def config_from(values: dict[str, Any], where: object) -> NemotronConfig:
    """A `NemotronConfig` of values that came from a file.

    Raises:
        CheckpointError: values that cannot be.
    """
    check_config_numbers(values, where)
    try:
        config = NemotronConfig.from_dict(values)
    except CheckpointError:
        raise
    except Exception as error:  # transformers validates with errors of its own; each means the same here
        raise CheckpointError(f"{where}: {' '.join(str(error).split())}") from None
    assert isinstance(config, NemotronConfig)
    return config


def read_tensors(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of a folder, of one file or of the shards that the index names; none of them read yet.

    Raises:
        CheckpointError: no weights, a missing shard, a tensor that is not where the index says, a cut file.
    """
    if (folder / INDEX).is_file():
        return _read_shards(folder, folder / INDEX)
    if (folder / SINGLE).is_file():
        return read_safetensors(folder / SINGLE)
    if (folder / BIN_INDEX).is_file():
        return _read_shards(folder, folder / BIN_INDEX)
    if (folder / BIN).is_file():
        return _read_file(folder / BIN)
    raise CheckpointError(f"{folder}: none of {SINGLE}, {INDEX}, {BIN} in it; expected the weights")


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
    shards: dict[str, dict[str, LazyTensor]] = {}
    for name, place in places.items():
        if place not in shards:
            path = file_inside(folder, place, index)
            require(path.is_file(), f"{index}: names {place}, which is not in {folder}; a shard is missing")
            shards[place] = _read_file(path)
        require(name in shards[place], f"{folder / place}: no tensor {name}, which {index.name} says is there")
    return {name: shards[place][name] for name, place in places.items()}


def check_shapes(config: NemotronConfig, tensors: Mapping[str, LazyTensor], where: object) -> None:
    """Compare names and shapes with the configuration. Heads other than the LM head are not looked at.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    # Question answering keeps the backbone under `transformer.`, transformers' own base models under no prefix.
    prefix = next((p for p in ("model.", "transformer.") if p + "embed_tokens.weight" in tensors), None)
    if prefix is None:
        prefix = "" if "embed_tokens.weight" in tensors else "model."
    classes = config.architectures or ["NemotronForCausalLM"]
    for name, shape in hf_shapes(config).items():
        if name.startswith("model."):
            name = prefix + name.removeprefix("model.")
        elif name not in tensors and classes[0] != "NemotronForCausalLM":
            continue
        require(name in tensors, f"{where}: no tensor {name}; config.json asks for it with shape {list(shape)}")
        found = tensors[name].shape
        require(found == shape, f"{where}: {name} has shape {list(found)}, config.json asks for {list(shape)}")


def open_hf(folder: Path) -> Checkpoint:
    """A Hugging Face folder as a checkpoint of lazy tensors, checked.

    Raises:
        CheckpointError: see `check_checkpoint`; also for quantized weights, which have no dense tensors.
    """
    config = read_config(folder)
    require(
        getattr(config, "quantization_config", None) is None,
        f"{folder}: the weights are quantized (quantization_config in config.json), expected dense ones",
    )
    tensors = read_tensors(folder)
    check_shapes(config, tensors, folder)
    files = {name: ByteRange.whole(folder / name) for name in SIDE_FILES if (folder / name).is_file()}
    return Checkpoint(config, tensors, files)


def generation_config(config: NemotronConfig) -> str:
    """Text of a `generation_config.json` for a checkpoint that came without one."""
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return json.dumps({"_from_model_config": True, **{k: v for k, v in ids.items() if v is not None}}, indent=2) + "\n"


def plan_shards(tensors: Mapping[str, LazyTensor], max_bytes: int) -> list[list[str]]:
    """Tensor names in file order, cut into shards of at most `max_bytes` (a larger tensor has one to itself)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def write_hf(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face folder: config, shards and index, tokenizer and other files. All or nothing.

    Tied embeddings are written once, as `model.embed_tokens.weight`. Memory: one block of one tensor.

    Raises:
        TargetError: the folder is there and `overwrite` is false, or it holds files that were not written here.
        WriteError: too little room on the disk.
    """
    tensors = dict(checkpoint.tensors)
    if checkpoint.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    require_space(folder, sum(tensor.nbytes for tensor in tensors.values()))
    with new_folder(folder, overwrite=overwrite) as target:
        write_shards(tensors, target, max_shard_bytes)
        write_side_files(checkpoint, target)
        checkpoint.config.save_pretrained(target)


def write_shards(tensors: Mapping[str, LazyTensor], target: Path, max_shard_bytes: int) -> None:
    """`model.safetensors`, or numbered shards and their index."""
    shards = plan_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(target / SINGLE, tensors)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(target / file, {name: tensors[name] for name in names})
        places |= dict.fromkeys(names, file)
    total = {
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        "total_parameters": sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors.values()),
    }
    index = {"metadata": total, "weight_map": dict(sorted(places.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_side_files(checkpoint: Checkpoint, target: Path) -> None:
    """Copy the checkpoint's other files and write those that a conversion made."""
    for name, data in checkpoint.files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with writing(target / name), (target / name).open("wb") as file:
            for start in range(0, data.size, 1 << 24):
                write_all(file, data.read(start, min(1 << 24, data.size - start)))
    for name, text in checkpoint.texts.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
