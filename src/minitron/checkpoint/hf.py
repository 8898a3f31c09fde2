"""Hugging Face folders: checked, read lazily, written as a stream.

`check_checkpoint` looks at headers only and is cheap; `open_hf` returns lazy tensors; `write_hf` writes shards of
bounded size, with an index, into a temporary folder that is renamed when everything is there.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minitron.config import ModelConfig, NemotronConfig, config_class
from minitron.files import new_folder, require_space, writing
from minitron.files.links import require_inside
from minitron.shapes import describe
from minitron.supported import check_supported

from .json_settings import check_config_values, check_generation_config, check_tokenizer_files
from .limits import MAX_CONFIG_BYTES, CheckpointError, CheckpointNote, read_json, require
from .parameters import check_shapes, parameters_of
from .safetensors_io import write_safetensors
from .tensors import ByteRange, Checkpoint, LazyTensor, write_all
from .weight_files import INDEX, SINGLE, check_index, find_weights, read_tensors

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
TEMPLATES = "additional_chat_templates"


def check_checkpoint(folder: Path) -> torch.dtype | None:
    """Check a Hugging Face folder; the error says in one sentence what is wrong. Reads headers only.

    Warns (`CheckpointNote`) about weight files that are not read.

    Returns:
        The dtype to load the weights in if it cannot be the stored one (float8); otherwise None.

    Raises:
        CheckpointError: no folder or config.json; another architecture; impossible settings; a weight file that is
            missing, truncated or corrupted; a missing shard of the index; a missing tensor or one with another shape
            than config.json states.
    """
    config, stored, tensors, notes = _read_checked(folder)
    check_index(folder)
    for note in notes:
        if "not used" in note:
            warnings.warn(note, CheckpointNote, stacklevel=2)
    widened = any(stored[name].dtype != tensor.dtype for name, tensor in tensors.items())
    return torch.bfloat16 if widened and config.dtype in (None, torch.bfloat16) else None


def _read_checked(
    folder: Path,
) -> tuple[ModelConfig, dict[str, LazyTensor], dict[str, LazyTensor], list[str]]:
    """Config, tensors as stored, tensors as parameters, notes; everything in the folder has been checked."""
    config = read_config(folder)
    if not isinstance(config, NemotronConfig):  # Nemotron's own classes load what transformers quantized
        require_dense(config, folder)
    check_settings(folder)
    stored = read_tensors(folder)
    tensors, notes = parameters_of(config, stored, folder)
    check_shapes(config, tensors, folder)
    weights = find_weights(folder)
    return config, stored, tensors, [*(weights.notes if weights else []), *notes]


def check_settings(folder: Path) -> None:
    """Check the other JSON files of the folder.

    Raises:
        CheckpointError: a generation config or tokenizer that cannot be read; an adapter next to whole weights.
    """
    check_generation_config(folder)
    check_tokenizer_files(folder)
    adapter = folder / "adapter_config.json"
    require(
        not adapter.exists(),
        f"{adapter}: an adapter beside the weights of a whole model, which transformers would apply if peft is "
        "installed and leave out if not; merge it (merge_and_unload) or move it to a folder of its own",
    )


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`, old spellings (`rope_percent`, `kv_channels`, ...) included.

    Raises:
        CheckpointError: missing or not JSON; another architecture; values that cannot be.
    """
    require(folder.exists(), f"{folder}: no such folder")
    require(folder.is_dir(), f"{folder}: not a folder; expected a Hugging Face checkpoint with config.json in it")
    path = folder / "config.json"
    require(path.is_file(), f"{folder}: no config.json in it; expected a Hugging Face checkpoint")
    return read_config_file(path)


def read_config_file(path: Path) -> ModelConfig:
    """The configuration in a JSON file of any name.

    Raises:
        CheckpointError: not JSON; another architecture; values that cannot be.
    """
    values = read_json(path, MAX_CONFIG_BYTES)
    return config_from(values, path)


def config_from(values: dict[str, Any], where: object) -> ModelConfig:
    """The configuration of values that came from a file, of the class of its family.

    Raises:
        CheckpointError: another architecture; values that cannot be.
    """
    try:
        family = check_supported(values)
        check_config_values(values, config_class(family), where)
        config = config_class(family).from_dict(values)
        describe(config)
    except CheckpointError:
        raise
    except Exception as error:  # transformers validates with errors of its own; each means the same here
        raise CheckpointError(f"{where}: {' '.join(str(error).split())}") from None
    return config


def read_parameters(folder: Path, config: ModelConfig) -> dict[str, LazyTensor]:
    """The tensors of a folder that are parameters of its model; see `parameters_of`."""
    return parameters_of(config, read_tensors(folder), folder)[0]


def open_hf(folder: Path) -> Checkpoint:
    """A Hugging Face folder as a checkpoint of lazy tensors, checked.

    Raises:
        CheckpointError: see `check_checkpoint`; also for quantized weights, which have no dense tensors.
    """
    config = read_config(folder)
    require_dense(config, folder)
    config, _, tensors, notes = _read_checked(folder)
    return Checkpoint(config, tensors, side_files(folder), notes=notes)


def require_dense(config: ModelConfig, where: object) -> None:
    """Refuse a model whose weights are quantized in transformers' way (bitsandbytes, GPTQ, AWQ and the like).

    Raises:
        CheckpointError: says what to use instead.
    """
    settings = getattr(config, "quantization_config", None)
    kind = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    named = f" by {getattr(kind, 'value', kind)}" if kind else ""
    require(
        settings is None,
        f"{where}: the weights are quantized{named} (quantization_config in config.json), expected dense ones. Use the "
        f"checkpoint that it was made from, which its model card names, and choose --format int8 or int4 where the "
        f"result runs; if there is no other, load it in transformers and save what model.dequantize() returns",
    )


def side_files(folder: Path) -> dict[str, ByteRange]:
    """The files that accompany the weights: tokenizer, generation config, chat templates; name to path.

    Raises:
        LinkedFileError: one is a link out of the folder.
    """
    names = [*SIDE_FILES, *sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))]
    found = [name for name in names if (folder / name).is_file()]
    for name in found:
        require_inside(folder / name, folder)
    return {name: ByteRange.whole(folder / name) for name in found}


def side_file_name(member: str) -> str | None:
    """The name in a Hugging Face folder of a file in another format's archive or folder; None if it has no place."""
    folder, _, last = member.rpartition("/")
    outer, _, inner = folder.rpartition("/")
    if inner == TEMPLATES and last.endswith(".jinja"):
        return f"{TEMPLATES}/{last}" if not outer or "tokenizer" in outer else None
    return last if last in SIDE_FILES and (not folder or "tokenizer" in folder) else None


def generation_config(config: ModelConfig) -> str:
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
        TargetError: the folder exists and `overwrite` is false, or it holds files that were not written here.
        WriteError: too little space on the disk.
    """
    tensors = dict(checkpoint.tensors)
    if checkpoint.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    require_space(folder, sum(tensor.nbytes for tensor in tensors.values()))
    with new_folder(folder, overwrite=overwrite) as target:
        write_shards(tensors, target, max_shard_bytes)
        write_side_files(checkpoint, target)
        save_config(checkpoint.config, target)


def save_model(model: Any, folder: Path, **options: Any) -> list[str] | None:
    """`save_pretrained`, which leaves the model's configuration as it is.

    transformers notes the dtype of the weights and the class in the configuration of the model itself.

    Args:
        model: of transformers, or an adapter of peft.
        folder: where to write.
        options: of `save_pretrained`.

    Returns:
        The names of classes that transformers wrote as `architectures`.
    """
    config = model.config
    before = {name: getattr(config, name, None) for name in ("dtype", "architectures")}
    try:
        model.save_pretrained(folder, **options)
        return config.architectures
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def save_config(config: ModelConfig, folder: Path) -> None:
    """Write config.json with the keys of transformers 5 and of older readers side by side.

    Without `rope_theta` and `rope_scaling`, a reader that does not know `rope_parameters` would compute with defaults.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in values:
        return
    values["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "dtype" in values:
        values["torch_dtype"] = values["dtype"]
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    """Copy the checkpoint's other files and write those that the conversion generated."""
    for name, data in checkpoint.files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with writing(target / name), (target / name).open("wb") as file:
            for start in range(0, data.size, 1 << 24):
                write_all(file, data.read(start, min(1 << 24, data.size - start)))
    for name, text in checkpoint.texts.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
