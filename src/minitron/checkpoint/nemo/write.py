"""Writing what NeMo and Megatron read: a torch_dist checkpoint, in a `.nemo` tar (NeMo 1) or a folder (NeMo 2).

Layers are stacked in dimension 0 with one chunk per layer, q, k and v are fused by query group, the vocabulary is
padded; everything is streamed, the tar too.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from minitron.config import NemotronConfig
from minitron.families import FAMILIES, family_of
from minitron.files import new_file, new_folder, require_space

from ..archive import FolderSink, TarSink
from ..limits import CheckpointError, require
from ..names import hf_shapes, hf_to_megatron, qkv_rows
from ..tensors import Checkpoint, LazyTensor, join_rows, pad_rows, zeros
from ..torch_file import write_object_record, write_tensor_record
from .config import nemo1_config, nemo2_model, yaml_values
from .files import model_context
from .megatron_files import metadata_json

VOCABULARY_MULTIPLE = 128
"""NeMo's default of make_vocab_size_divisible_by."""
# Modules of Megatron's layers that keep an "extra state" (FP8 scales of Transformer Engine; here: none).
_WITH_EXTRA_STATE = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")

Sink = FolderSink | TarSink


def write_nemo(checkpoint: Checkpoint, target: Path, *, form: str = "nemo", overwrite: bool = False) -> None:
    """Write a NeMo checkpoint. All or nothing; memory: one block of one tensor.

    Args:
        checkpoint: a causal language model under Hugging Face names.
        target: a file for `form` "nemo", a folder for "nemo2".
        form: "nemo": tar with model_config.yaml and model_weights/; "nemo2": weights/ and context/.
        overwrite: replace an existing target.

    Raises:
        CheckpointError: another family; an activation or RoPE type that NeMo has no key for.
        TargetError: the target exists and `overwrite` is false, or it holds files that were not written here.
        WriteError: no space on the disk.
    """
    require(form in ("nemo", "nemo2"), f"form is {form!r}, expected 'nemo' or 'nemo2'")
    family = family_of(checkpoint.config)
    nemotron = family is FAMILIES["nemotron"]
    require(
        nemotron, f"NeMo is written for Nemotron only, and this is a {family.title}; write Hugging Face or GGUF instead"
    )
    config, stacks = checkpoint.config, megatron_stacks(checkpoint)
    dtype = str(next(iter(checkpoint.tensors.values())).dtype).removeprefix("torch.")
    require_space(target, sum(t.nbytes for stack in stacks.values() for t in stack))
    if form == "nemo2":
        _write_nemo2(checkpoint, target, stacks, dtype, overwrite=overwrite)
        return
    files = _side_files(checkpoint)
    model = files.pop("tokenizer.model", None)
    name = None
    if model is not None:
        name = f"{hashlib.md5(model, usedforsecurity=False).hexdigest()}_tokenizer.model"
        files[name] = model
    text = _yaml(nemo1_config(config, dtype, name, VOCABULARY_MULTIPLE))
    with new_file(target, overwrite=overwrite) as draft, TarSink(draft) as tar:
        _write_bytes(tar, "model_config.yaml", text)
        for each, data in files.items():
            _write_bytes(tar, each, data)
        write_torch_dist(tar, "model_weights", "model.", stacks)


def _write_nemo2(
    checkpoint: Checkpoint, target: Path, stacks: dict[str, list[LazyTensor]], dtype: str, *, overwrite: bool
) -> None:
    config, files = checkpoint.config, _side_files(checkpoint)
    place = None
    if {"tokenizer.json", "tokenizer_config.json"} & files.keys():
        place = "nemo_tokenizer"
    elif "tokenizer.model" in files:
        place = "nemo_tokenizer/tokenizer.model"
    rows = stacks["embedding.word_embeddings.weight"][0].shape[0]
    model = nemo2_model(config, dtype, VOCABULARY_MULTIPLE, rows, place)
    described = yaml_values(model)
    # NeMo builds from io.json and must find as many rows as there are; model.yaml is for readers.
    described["config"]["vocab_size"] = config.vocab_size
    with new_folder(target, overwrite=overwrite) as folder:
        sink = FolderSink(folder)
        _write_bytes(sink, "context/io.json", model_context(model))
        _write_bytes(sink, "context/model.yaml", _yaml(described))
        for name, data in files.items():
            _write_bytes(sink, f"context/nemo_tokenizer/{name}", data)
        write_torch_dist(sink, "weights", "module.", stacks)


def _yaml(values: dict[str, Any]) -> bytes:
    try:
        import yaml
    except ImportError:
        raise CheckpointError("writing NeMo checkpoints needs PyYAML: pip install 'minitron[nemo]'") from None
    return yaml.safe_dump(values, sort_keys=True).encode()


def _side_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    files = {name: data.read() for name, data in checkpoint.files.items()}
    return {**files, **{name: text.encode() for name, text in checkpoint.texts.items()}}


def _write_bytes(sink: Sink, name: str, data: bytes) -> None:
    with sink.open(name) as file:
        file.write(data)


def megatron_stacks(checkpoint: Checkpoint) -> dict[str, list[LazyTensor]]:
    """Megatron's names without layer numbers -> one tensor per layer (or a list of one for the others)."""
    config = checkpoint.config
    stacks: dict[str, list[LazyTensor]] = {}
    for name in _with_all_biases(config):
        base, part = hf_to_megatron(name)
        if part in ("k", "v"):
            continue  # they go with q
        tensor = _fused(checkpoint, name, config) if part else _get(checkpoint, name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = pad_rows(tensor, -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
        stacks.setdefault(re.sub(r"layers\.\d+\.", "layers.", base), []).append(tensor)
    return stacks


def _with_all_biases(config: NemotronConfig) -> list[str]:
    """Parameter names; NeMo has one switch for all biases, so both kinds are written if there is one of them."""
    if bool(config.attention_bias) == bool(config.mlp_bias):
        return list(hf_shapes(config))
    both = NemotronConfig.from_dict({**config.to_dict(), "attention_bias": True, "mlp_bias": True})
    return list(hf_shapes(both))


def _get(checkpoint: Checkpoint, name: str) -> LazyTensor:
    if name in checkpoint.tensors or not name.endswith("_proj.bias"):
        return checkpoint.get(name)
    weight = checkpoint.get(name.removesuffix("bias") + "weight")
    return zeros(weight.shape[:1], weight.dtype)


def _fused(checkpoint: Checkpoint, q_name: str, config: NemotronConfig) -> LazyTensor:
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert groups is not None
    assert width is not None
    pieces: list[tuple[int, LazyTensor]] = []
    for part, runs in qkv_rows(heads, groups, width).items():
        tensor, done = _get(checkpoint, q_name.replace("q_proj", f"{part}_proj")), 0
        for start, stop in runs:
            pieces.append((start, tensor.take_rows([(done, done + stop - start)])))
            done += stop - start
    return join_rows([tensor for _, tensor in sorted(pieces, key=lambda piece: piece[0])])


def write_torch_dist(sink: Sink, folder: str, prefix: str, stacks: dict[str, list[LazyTensor]]) -> None:
    """A torch.distributed.checkpoint folder that megatron-core accepts: one data file, `.metadata`, `common.pt`."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    data_file = "__0_0.distcp"
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with sink.open(f"{folder}/{data_file}") as file:
        for name, layers in stacks.items():
            key, stacked = prefix + name, name.startswith("decoder.layers.")
            chunks = []
            for number, tensor in enumerate(layers):
                sizes = (1, *tensor.shape) if stacked else tensor.shape
                offsets = torch.Size((number, *[0] * len(tensor.shape)) if stacked else [0] * len(tensor.shape))
                start = file.tell()
                length = write_tensor_record(file, tensor, sizes)
                places[MetadataIndex(key, offsets)] = _StorageInfo(data_file, start, length)
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(sizes)))
            whole = (len(layers), *layers[0].shape) if stacked else layers[0].shape
            properties = TensorProperties(dtype=layers[0].dtype)
            described[key] = TensorStorageMetadata(properties, torch.Size(whole), chunks)
        layers_in_all = len(stacks.get("decoder.layers.mlp.linear_fc2.weight", ()))
        for module in _WITH_EXTRA_STATE:
            for number in range(layers_in_all):
                key = f"{prefix}decoder.layers.{module}._extra_state/shard_{number}_{layers_in_all}"
                start = file.tell()
                places[MetadataIndex(key)] = _StorageInfo(data_file, start, write_object_record(file, [None]))
                described[key] = BytesStorageMetadata()
    metadata = Metadata(described, None, places, StorageMeta())
    _write_bytes(sink, f"{folder}/.metadata", pickle.dumps(metadata, protocol=4))
    with sink.open(f"{folder}/common.pt") as file:
        write_object_record(file, {})
    _write_bytes(sink, f"{folder}/metadata.json", metadata_json("torch_dist"))
