"""LoRA adapters as peft writes them, merged into their base model while it is read: W + scale * B @ A, row by row.

Only what is a plain LoRA is merged. Everything else that an adapter folder may hold (DoRA, other methods, unknown
tensors) is refused, because leaving it out would give another model. No pattern in the configuration is run as a
regular expression.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .detect import ADAPTER_CONFIG
from .hf import side_files
from .limits import CheckpointError, read_json, require
from .safetensors_io import read_safetensors
from .tensors import Checkpoint, LazyTensor

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
# Settings of peft under which the merged weights are not W + scale * B @ A.
_UNSUPPORTED = (
    "use_dora", "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora", "lora_bias",
    "alora_invocation_tokens", "arrow_config", "eva_config",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """What merging needs of adapter_config.json."""

    base: str
    """Folder or repository id of the base model."""
    rank: int
    alpha: float
    alpha_pattern: Mapping[str, float]
    """Other alphas, by the end of a module's name."""
    rank_stabilized: bool
    """Divide alpha by the square root of the rank, not by the rank."""

    def scale(self, module: str, rank: int) -> float:
        """What multiplies B @ A of a module."""
        alpha = next(
            (value for name, value in self.alpha_pattern.items() if f".{module}".endswith(f".{name}")), self.alpha
        )
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The settings of the adapter in `folder`.

    Raises:
        CheckpointError: another method than LoRA, or a setting under which merging would be wrong.
    """
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    kind = values.get("peft_type")
    require(kind == "LORA", f"{path}: peft_type is {kind!r}; only 'LORA' can be merged")
    for name in _UNSUPPORTED:
        require(not values.get(name), f"{path}: {name} is set; such an adapter cannot be merged here, use peft")
    base = values.get("base_model_name_or_path")
    named = isinstance(base, str) and base
    require(named, f"{path}: base_model_name_or_path is {base!r}; it must name the base model's folder or repository")
    pattern = values.get("alpha_pattern") or {}
    require(isinstance(pattern, dict), f"{path}: alpha_pattern is a {type(pattern).__name__}, expected an object")
    return AdapterConfig(
        str(base),
        int(_number(path, "r", values.get("r"))),
        _number(path, "lora_alpha", values.get("lora_alpha")),
        {_plain_name(path, name): _number(path, f"alpha_pattern: {name}", value) for name, value in pattern.items()},
        values.get("use_rslora") is True,
    )


def _number(path: Path, field: str, value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
    require(good, f"{path}: {field} is {value!r}; it must be a number above 0")
    return value


def _plain_name(path: Path, pattern: str) -> str:
    """The module name that an alpha_pattern's key spells; peft would match it as a regular expression."""
    name = pattern.removeprefix("^")
    good = re.fullmatch(r"[\w.]+", name, re.ASCII) is not None
    require(good, f"{path}: alpha_pattern: {pattern!r} is a regular expression; only names of modules are supported")
    return name


def merge_adapter(folder: Path, base: Checkpoint) -> Checkpoint:
    """The base checkpoint with the adapter in `folder` merged into it, still on disk.

    Sums are formed in float32 and rounded once, to the dtype of the base. A tokenizer beside the adapter replaces
    that of the base.

    Raises:
        CheckpointError: the adapter is not a plain LoRA of this base, or its tensors do not fit.
    """
    config = read_adapter_config(folder)
    path = folder / WEIGHTS
    require(path.is_file(), f"{folder}: no {WEIGHTS} in it; adapters in other files are not read")
    tensors, pairs = dict(base.tensors), {}
    for name, tensor in read_safetensors(path).items():
        require(name.startswith(_PREFIX), f"{path}: {name} does not begin with {_PREFIX}; it is no adapter of a model")
        local = name.removeprefix(_PREFIX)
        found = _PAIR.fullmatch(local)
        if found is not None:
            pairs.setdefault((found["module"], bool(found["embedding"])), {})[found["side"]] = tensor
            continue
        # modules_to_save and biases: trained whole.
        local = local.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        require(local in tensors, f"{path}: {name} belongs to nothing in the base model {config.base}")
        same = tensors[local].shape == tensor.shape
        require(same, f"{path}: {name} has shape {list(tensor.shape)}, the base model's {list(tensors[local].shape)}")
        tensors[local] = tensor.to(tensors[local].dtype)
    require(pairs, f"{path}: no lora_A and lora_B in it")
    for (module, embedding), sides in pairs.items():
        name = f"{module}.weight"
        require(set(sides) == {"A", "B"}, f"{path}: {module} has lora_{next(iter(sides))} only")
        require(name in tensors, f"{path}: {module} is adapted; the base model {config.base} has no {name}")
        merge = _merged_embedding if embedding else _merged
        scale = config.scale(module, sides["B"].shape[-1])
        tensors[name] = merge(tensors[name], sides["A"], sides["B"], scale, f"{path}: {module}")
    beside = side_files(folder)
    notes = [*base.notes, f"LoRA adapter {folder.name}: merged into {len(pairs)} matrices of {config.base}"]
    return replace(base, tensors=tensors, files={**base.files, **beside}, notes=notes)


def _merged(base: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float, where: str) -> LazyTensor:
    """(outputs, inputs): W + scale * B @ A, with A (r, inputs) and B (outputs, r)."""
    _check(base, (b.shape[:1], a.shape[1:]), a.shape[:1] == b.shape[1:], a, b, where)
    down = a.load().float() * scale

    def rows(start: int, stop: int) -> torch.Tensor:
        return (base.rows(start, stop).float() + b.rows(start, stop).float() @ down).to(base.dtype)

    return LazyTensor(base.shape, base.dtype, rows)


def _merged_embedding(base: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float, where: str) -> LazyTensor:
    """(V, D): W + scale * (B @ A).T, with A (r, V) and B (D, r)."""
    _check(base, (a.shape[1:], b.shape[:1]), a.shape[:1] == b.shape[1:], a, b, where)
    by_token, up = a.load().float().T, b.load().float().T * scale

    def rows(start: int, stop: int) -> torch.Tensor:
        return (base.rows(start, stop).float() + by_token[start:stop] @ up).to(base.dtype)

    return LazyTensor(base.shape, base.dtype, rows)


def _check(base: LazyTensor, shape: tuple[Any, Any], same: bool, a: LazyTensor, b: LazyTensor, where: str) -> None:
    fits = len(a.shape) == len(b.shape) == 2 and same and base.shape == (*shape[0], *shape[1])
    if not fits:
        raise CheckpointError(
            f"{where}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit the weight {list(base.shape)}"
        )
