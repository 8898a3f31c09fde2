"""LoRA adapters as peft writes them, merged into their base model while it is read: W + scale * B @ A, row by row.

Only plain LoRA is merged. Everything else that an adapter folder may hold (DoRA, other methods, unknown tensors) is
refused, because ignoring it would give another model. No pattern in the configuration is run as a regular expression.
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
from .limits import MAX_CONFIG_BYTES, CheckpointError, read_json, require, shown
from .safetensors_io import read_safetensors
from .tensors import Checkpoint, LazyTensor

WEIGHTS = "adapter_model.safetensors"
_MAX_NAME = 4096
_PLAIN_NAME = re.compile(r"\^?[\w.]+", re.ASCII)
_PREFIX = "base_model.model."
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
# Settings of peft under which the merged weights are not W + scale * B @ A.
_UNSUPPORTED = (
    "use_dora", "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora", "lora_bias",
    "alora_invocation_tokens", "arrow_config", "eva_config",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of adapter_config.json that merging needs."""

    base: str
    """Folder or repository id of the base model."""
    rank: int
    alpha: float
    ranks: frozenset[int]
    """The ranks that modules may have: `rank`, and those of rank_pattern."""
    alpha_pattern: Mapping[str, float]
    """Other alphas, by the end of a module's name, or by `^` and its whole name; the first that fits counts."""
    rank_stabilized: bool
    """Divide alpha by the square root of the rank, not by the rank."""

    def scale(self, module: str, rank: int) -> float:
        """What multiplies B @ A of a module."""
        # By the few ends of the name, not by the many patterns that a file may hold.
        parts = module.split(".")
        ends = [f"^{module}", *(".".join(parts[start:]) for start in range(len(parts)))]
        found = [end for end in ends if end in self.alpha_pattern]
        if len(found) > 1:
            order = {name: place for place, name in enumerate(self.alpha_pattern)}
            found.sort(key=order.__getitem__)
        alpha = self.alpha_pattern[found[0]] if found else self.alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The settings of the adapter in `folder`.

    Raises:
        CheckpointError: another method than LoRA, or a setting under which merging would be wrong.
    """
    path = folder / ADAPTER_CONFIG
    values = read_json(path, MAX_CONFIG_BYTES)
    kind = values.get("peft_type")
    require(kind == "LORA", f"{path}: peft_type is {shown(kind)}; only 'LORA' can be merged")
    for name in _UNSUPPORTED:
        require(not values.get(name), f"{path}: {name} is set; such an adapter cannot be merged here, use peft")
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not 0 < len(base) <= _MAX_NAME:
        raise CheckpointError(
            f"{path}: base_model_name_or_path is {shown(base)}; it must name the base model's folder or repository"
        )
    stabilized = values.get("use_rslora")
    flag = stabilized is None or isinstance(stabilized, bool)
    require(flag, f"{path}: use_rslora is {shown(stabilized)}; it must be true or false")
    rank = _rank(path, "r", values.get("r"))
    ranks = _pattern(path, "rank_pattern", values)
    alphas = _pattern(path, "alpha_pattern", values)
    for name in alphas:
        plain = _PLAIN_NAME.fullmatch(name) is not None
        require(
            plain,
            f"{path}: alpha_pattern: {shown(name)} is a regular expression; only names of modules are supported",
        )
    return AdapterConfig(
        base,
        rank,
        _number(path, "lora_alpha", values.get("lora_alpha")),
        frozenset({rank, *(_rank(path, f"rank_pattern: {shown(name)}", value) for name, value in ranks.items())}),
        {name: _number(path, f"alpha_pattern: {shown(name)}", value) for name, value in alphas.items()},
        bool(stabilized),
    )


def _pattern(path: Path, field: str, values: dict[str, Any]) -> dict[str, Any]:
    """An object from names of modules to numbers. peft matches the names as regular expressions; no one is run here."""
    found = values.get(field)
    require(
        found is None or isinstance(found, dict), f"{path}: {field} is a {type(found).__name__}, expected an object"
    )
    return found or {}


def _number(path: Path, field: str, value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
    require(good, f"{path}: {field} is {shown(value)}; it must be a number above 0")
    return value


def _rank(path: Path, field: str, value: Any) -> int:
    number = _number(path, field, value)
    require(number == int(number), f"{path}: {field} is {shown(value)}; it must be a whole number above 0")
    return int(number)


def merge_adapter(folder: Path, base: Checkpoint) -> Checkpoint:
    """The base checkpoint with the adapter in `folder` merged into it, still on disk.

    Sums are formed in float32 and rounded once, to the dtype of the base. A tokenizer in the adapter's folder replaces
    that of the base.

    Raises:
        CheckpointError: the adapter is not a plain LoRA of this base, or its tensors do not fit.
    """
    config = read_adapter_config(folder)
    path = folder / WEIGHTS
    require(path.is_file(), f"{folder}: no {WEIGHTS} in it; adapters in other files are not read")
    tensors = dict(base.tensors)
    whole, pairs = _sorted_out(read_safetensors(path), path)
    for local, tensor in whole.items():
        require(local in tensors, f"{path}: {local} belongs to nothing in the base model {config.base}")
        same = tensors[local].shape == tensor.shape
        require(same, f"{path}: {local} has shape {list(tensor.shape)}, the base model's {list(tensors[local].shape)}")
        tensors[local] = tensor.to(tensors[local].dtype)
    for (module, embedding), sides in pairs.items():
        name = f"{module}.weight"
        require(set(sides) == {"A", "B"}, f"{path}: {module} has lora_{next(iter(sides))} only")
        require(name in tensors, f"{path}: {module} is adapted; the base model {config.base} has no {name}")
        merge = _merged_embedding if embedding else _merged
        tensors[name] = merge(tensors[name], sides["A"], sides["B"], config, module, path)
    beside = side_files(folder)
    notes = [*base.notes, f"LoRA adapter {folder.name}: merged into {len(pairs)} matrices of {config.base}"]
    return replace(base, tensors=tensors, files={**base.files, **beside}, notes=notes)


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one linear module: `scale * up @ (down @ x)`."""

    module: str
    down: torch.Tensor
    """(r, inputs)."""
    up: torch.Tensor
    """(outputs, r)."""
    scale: float


def read_low_rank(folder: Path, weights: Mapping[str, torch.Tensor]) -> list[LowRank]:
    """The matrices of the adapter in `folder`, to be added to a base model that stays as it is.

    Args:
        folder: a LoRA adapter.
        weights: the base model's, by name; only their shapes are read.

    Raises:
        CheckpointError: the adapter does not fit, or holds more than low-rank matrices of linear modules.
    """
    config, path = read_adapter_config(folder), folder / WEIGHTS
    require(path.is_file(), f"{folder}: no {WEIGHTS} in it; adapters in other files are not read")
    whole, pairs = _sorted_out(read_safetensors(path), path)
    embedding = [module for module, is_embedding in pairs if is_embedding]
    other = next(iter([*whole, *embedding]), None)
    require(other is None, f"{path}: {other} is trained beside low-rank matrices of linear modules; merge the adapter")
    found = []
    for (module, _), sides in pairs.items():
        name = f"{module}.weight"
        require(set(sides) == {"A", "B"}, f"{path}: {module} has lora_{next(iter(sides))} only")
        require(name in weights, f"{path}: {module} is adapted; the base model {config.base} has no {name}")
        a, b, shape = sides["A"], sides["B"], tuple(weights[name].shape)
        fits = len(a.shape) == len(b.shape) == 2 and shape == (b.shape[0], a.shape[1])
        found.append(LowRank(module, a.load(), b.load(), _scale(config, module, shape, a, b, fits, path)))
    return found


Pairs = dict[tuple[str, bool], dict[str, LazyTensor]]


def _sorted_out(found: Mapping[str, LazyTensor], path: Path) -> tuple[dict[str, LazyTensor], Pairs]:
    """The tensors of an adapter by their names in the base model: those that replace one (modules_to_save, biases), and
    the pairs "A" and "B" of (module, whether it is an embedding)."""
    whole: dict[str, LazyTensor] = {}
    pairs: Pairs = {}
    for name, tensor in found.items():
        if not name.startswith(_PREFIX):
            raise CheckpointError(f"{path}: {name} does not begin with {_PREFIX}; it is no adapter of a model")
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, expected floating-point numbers")
        local = name.removeprefix(_PREFIX)
        match = _PAIR.fullmatch(local)
        if match is None:
            place, key = whole, local.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        else:
            place, key = pairs.setdefault((match["module"], bool(match["embedding"])), {}), match["side"]
        if key in place:
            raise CheckpointError(f"{path}: {name} appears twice, under two spellings")
        place[key] = tensor
    require(pairs, f"{path}: no lora_A and lora_B in it")
    twice = next((module for module, embedding in pairs if embedding and (module, False) in pairs), None)
    require(twice is None, f"{path}: {twice} has lora_A and lora_embedding_A; expected one of them")
    return whole, pairs


def _merged(
    base: LazyTensor, a: LazyTensor, b: LazyTensor, config: AdapterConfig, module: str, path: Path
) -> LazyTensor:
    """(outputs, inputs): W + scale * B @ A, with A (r, inputs) and B (outputs, r)."""
    fits = len(a.shape) == len(b.shape) == 2 and base.shape == (b.shape[0], a.shape[1])
    down = a.load().float() * _scale(config, module, base.shape, a, b, fits, path)

    def rows(start: int, stop: int) -> torch.Tensor:
        return (base.rows(start, stop).float() + b.rows(start, stop).float() @ down).to(base.dtype)

    return LazyTensor(base.shape, base.dtype, rows)


def _merged_embedding(
    base: LazyTensor, a: LazyTensor, b: LazyTensor, config: AdapterConfig, module: str, path: Path
) -> LazyTensor:
    """(V, D): W + scale * (B @ A).T, with A (r, V) and B (D, r)."""
    fits = len(a.shape) == len(b.shape) == 2 and base.shape == (a.shape[1], b.shape[0])
    scale = _scale(config, module, base.shape, a, b, fits, path)
    by_token, up = a.load().float().T, b.load().float().T * scale

    def rows(start: int, stop: int) -> torch.Tensor:
        return (base.rows(start, stop).float() + by_token[start:stop] @ up).to(base.dtype)

    return LazyTensor(base.shape, base.dtype, rows)


def _scale(
    config: AdapterConfig,
    module: str,
    shape: tuple[int, ...],
    a: LazyTensor,
    b: LazyTensor,
    fits: bool,
    path: Path,
) -> float:
    """The scale of a module whose matrices fit its weight, have one rank, and one that the configuration has too."""
    if not fits or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{path}: {module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit the weight {list(shape)}"
        )
    rank = a.shape[0]
    if rank not in config.ranks:
        raise CheckpointError(
            f"{path}: {module} has rank {rank}, {ADAPTER_CONFIG} says {', '.join(map(str, sorted(config.ranks)[:5]))}"
        )
    return config.scale(module, rank)
