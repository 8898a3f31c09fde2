"""The identity of a checkpoint's model as one hash, for plans, caches and results that belong to one model only."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minitron.config import ModelConfig, NemotronConfig
from minitron.shapes import describe

from .hf import read_config, read_parameters
from .tensors import LazyTensor, raw

# These and the tensors determine what the model computes; the rest (dtype, caches, token ids, initialization,
# versions of writers) may differ between two copies of one model.
_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "norm_eps",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "pruned_heads",
    "quantization_config",
)
_BLOCK_BYTES = 4 << 20
_THREADS = min(4, os.cpu_count() or 1)


def fingerprint(folder: Path) -> str:
    """SHA-256, in hex, of what the model in a Hugging Face folder computes: configuration and weights.

    The same for any sharding, order or container (safetensors, `pytorch_model.bin`) of the same tensors, for old and
    new spellings of the same configuration, and for tied embeddings stored once or twice; different when a name, a
    dtype, a shape or a bit of a tensor differs. The tokenizer is not part of it. Reads every byte once, in blocks of
    4 MB; nothing is kept.

    Raises:
        CheckpointError: no readable checkpoint there; see `checkpoint.hf.read_config` and `read_parameters`.
    """
    config = read_config(folder)
    tensors = read_parameters(folder, config)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    names = sorted(tensors)
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib and file reads run outside the interpreter lock
        digests = pool.map(lambda name: _digest(tensors[name]), names)
        lines = [
            [name, str(tensors[name].dtype), list(tensors[name].shape), digest]
            for name, digest in zip(names, digests, strict=True)
        ]
    return hashlib.sha256(json.dumps([_identity(config), lines], sort_keys=True).encode()).hexdigest()


def _digest(tensor: LazyTensor) -> str:
    digest = hashlib.sha256()
    for block in tensor.blocks(_BLOCK_BYTES):
        digest.update(raw(block))
    return digest.hexdigest()


def _identity(config: ModelConfig) -> dict[str, Any]:
    values = {key: getattr(config, key, None) for key in _CONFIG_KEYS}
    if not isinstance(config, NemotronConfig):
        values |= {"model_type": config.model_type, "head_dim": describe(config).head_dim}
    return {key: _plain(value) for key, value in values.items() if value is not None and value != {}}


def _plain(value: Any) -> Any:
    """Numbers without the difference between 10000 and 10000.0, which writers of JSON do not keep."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, str | bool) or value is None else repr(value)
