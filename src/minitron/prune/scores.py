"""Importance scores as a file: what calibration measured, independent of what is cut later.

`importance.safetensors` holds one vector per layer and axis, and in its header as JSON what they were made from.
Pruning to another size then needs no forward pass. Higher means more important, on every axis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.limits import parse_json
from ..checkpoint.safetensors_io import read_safetensors
from ..checkpoint.tensors import LazyTensor
from ..config import ModelConfig
from ..files import new_file

FORMAT = "minitron-importance-1"
_KEY = "minitron"
_PER_LAYER = ("heads", "groups", "neurons")


class ScoresError(ValueError):
    """Scores that cannot be used; the message names the file, the field and what would be right."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance on every axis of a model with L layers; all tensors float64, finite, on the CPU.

    Raises:
        ScoresError: a vector of another rank or dtype, with a value that is not finite, or missing for a layer.
    """

    heads: list[Tensor]
    """L times (N,): query heads, compared within a layer, or within a group of it."""
    groups: list[Tensor]
    """L times (K,): key/value heads with all the query heads they serve, compared within a layer."""
    neurons: list[Tensor]
    """L times (F,): hidden neurons of the MLP, compared within a layer."""
    channels: Tensor
    """(D,): channels of the residual stream, one ranking for the whole model."""
    layers: Tensor
    """(L,): each layer alone."""
    windows: dict[int, Tensor] = field(default_factory=dict)
    """Contiguous layers: length n to (L + 1 - n,), entry i being layers i to i + n - 1. May be empty."""
    about: dict[str, Any] = field(default_factory=dict)
    """What JSON can hold: fingerprint of the checkpoint, hash of the calibration blocks, aggregation, ..."""

    def __post_init__(self) -> None:
        count = self.num_layers
        for axis in _PER_LAYER:
            vectors = getattr(self, axis)
            if len(vectors) != count:
                raise ScoresError(f"{axis}: scores of {len(vectors)} layers, expected {count} as in 'layers'")
            for layer, vector in enumerate(vectors):
                _check(vector, f"{axis} of layer {layer}")
        _check(self.channels, "channels")
        _check(self.layers, "layers")
        for length, vector in self.windows.items():
            _check(vector, f"windows of {length} layers")
            if len(vector) != count + 1 - length:
                expected = count + 1 - length
                raise ScoresError(f"windows of {length} layers: {len(vector)} scores, expected {expected}")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    def check_fits(self, config: ModelConfig) -> None:
        """Refuse a model of another shape.

        Raises:
            ScoresError: names the axis, the number found and the number in the configuration.
        """
        if self.num_layers != config.num_hidden_layers:
            raise ScoresError(f"the scores are of {self.num_layers} layers, the model has {config.num_hidden_layers}")
        expected = {
            "groups": config.num_key_value_heads,
            "neurons": config.intermediate_size,
            "heads": config.num_attention_heads,
        }
        for axis, size in expected.items():
            for layer, vector in enumerate(getattr(self, axis)):
                if len(vector) != size:
                    raise ScoresError(f"the scores of layer {layer} are of {len(vector)} {axis}, the model has {size}")
        if len(self.channels) != config.hidden_size:
            raise ScoresError(f"the scores are of {len(self.channels)} channels, the model has {config.hidden_size}")

    def save(self, path: str | Path) -> None:
        """Write the file, all or nothing."""
        path = Path(path)
        tensors = {"channels": self.channels, "layers": self.layers}
        tensors |= {f"{axis}.{i}": x for axis in _PER_LAYER for i, x in enumerate(getattr(self, axis))}
        tensors |= {f"windows.{length}": vector for length, vector in self.windows.items()}
        header = {"format": FORMAT, "num_layers": self.num_layers, "about": self.about}
        # Copies, because the library refuses tensors that share memory.
        contents = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        with new_file(path, overwrite=True) as draft:
            save_file(contents, draft, metadata={_KEY: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read and check the file.

        Raises:
            ScoresError, CheckpointError: it is missing, damaged, of another kind or version, or incomplete.
        """
        path = Path(path)
        tensors = read_safetensors(path)
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        if text is None:
            raise ScoresError(f"{path}: has no importance scores; expected a file that was made by scoring a model")
        header = parse_json(text.encode(), f"{path} (header)")
        if header.get("format") != FORMAT:
            raise ScoresError(f"{path}: format is {header.get('format')!r}, expected {FORMAT!r}; score the model again")
        try:
            return cls(**_fields(tensors, header))
        except KeyError as error:
            raise ScoresError(f"{path}: no tensor {error.args[0]!r}; the file is incomplete") from None
        except (ScoresError, TypeError, ValueError) as error:
            raise ScoresError(f"{path}: {error}") from None


def _fields(tensors: Mapping[str, LazyTensor], header: Mapping[str, Any]) -> dict[str, Any]:
    count, about = header.get("num_layers"), header.get("about")
    if type(count) is not int or count < 1 or not isinstance(about, dict):
        raise ScoresError(f"num_layers is {count!r} and about {type(about).__name__}, expected a number and an object")
    if f"heads.{count - 1}" not in tensors:  # before a long loop over a number that came from a file
        raise KeyError(f"heads.{count - 1}")
    parts: dict[str, Any] = {
        axis: [tensors[f"{axis}.{i}"].load() for i in range(count)] for axis in _PER_LAYER
    }  # fmt: skip
    windows = {name.removeprefix("windows."): x for name, x in tensors.items() if name.startswith("windows.")}
    parts["windows"] = {int(length): windows[length].load() for length in sorted(windows, key=int)}
    return {**parts, "channels": tensors["channels"].load(), "layers": tensors["layers"].load(), "about": about}


def _check(vector: Tensor, name: str) -> None:
    if vector.dim() != 1 or vector.dtype != torch.float64:
        found = f"{vector.dtype} of shape {list(vector.shape)}"
        raise ScoresError(f"{name}: found {found}, expected one dimension of torch.float64")
    if not torch.isfinite(vector).all():
        index = int((~torch.isfinite(vector)).nonzero()[0])
        raise ScoresError(f"{name}: score {index} is {vector[index].item()}, expected a finite number")
