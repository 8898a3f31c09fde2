"""The engine's weights (`engine.parts`) of a model in memory, whose matrices are shared where that is possible, or of a
checkpoint on disk.

Sizes and constants of a model in memory are those of its modules and tensors, as its `forward` uses them; its `config`
may have been changed since.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .. import pages
from ..checkpoint.hf import open_hf
from ..checkpoint.tensors import LazyTensor
from ..families import Family, family_of
from ..family_models import rotary_of
from ..finite import NotFiniteError
from ..head_pruning import kept_heads
from ..shapes import describe
from .matrix import Format, Matrix, row_bytes
from .parts import (
    DOWN,
    EMBEDDING,
    HEAD,
    NORM,
    Constants,
    EngineWeights,
    LayerWeights,
    Norm,
    assemble,
    frequencies,
    head_format,
)
from .quantize import PLAIN, quantize, quantize_blocks

__all__ = [
    "EMBEDDING",
    "HEAD",
    "NORM",
    "WEIGHT_DTYPES",
    "Constants",
    "EngineWeights",
    "LayerWeights",
    "Norm",
    "constants_from_config",
    "constants_of",
    "copied",
    "format_of",
    "from_checkpoint",
    "from_model",
    "head_format",
    "norm_eps",
    "parts_of",
    "tensors_of",
    "weight_bytes",
]

WEIGHT_DTYPES = (torch.bfloat16, torch.float32)
"""What the decode kernels read where weights are not quantized. The reference takes any floating dtype."""

ROUNDING = 5e-7
"""Largest relative difference of two powers in fp32: four times that of its last bit."""
PIECE_BYTES = 1 << 22
"""Bytes of a matrix that is transposed piece by piece while it is quantized."""
MOST_READINGS = 8
"""Largest number of its pieces, since each reads the whole matrix: larger matrices have larger pieces."""


def weight_bytes(config: PreTrainedConfig, format: Format) -> int:
    """Bytes of a model's matrices in a format, without bf12's escapes (below a percent for real weights)."""
    shape = describe(config)
    D, H, V = shape.hidden, shape.head_dim, shape.vocab

    def size(rows: int, columns: int, format: str = format) -> int:
        return rows * row_bytes(format, columns) + (8 * rows + 4 if format == "bf12" else 0)

    total = size(V, D, head_format(format)) + (0 if shape.tied else size(V, D))
    for index in range(shape.layers):
        heads, groups = kept_heads(config, index)
        total += size(heads * H, D) + 2 * size(groups * H, D) + size(D, heads * H)
        total += 2 * size(shape.ffn, D) + size(D, shape.ffn) if shape.family.gated else 2 * size(shape.ffn, D)
    return total


def from_model(
    model: PreTrainedModel, format: Format | None = None, copies: dict[str, Matrix] | None = None
) -> EngineWeights:
    """The weights of a model on the CPU.

    Args:
        model: its matrices are shared, except Nemotron's `down_proj`, if the format is that of their dtype.
        format: that of the model's dtype if None.
        copies: matrices that are not shared, by the names of their parameters. Those that it contains are reused; the
            others are made and added to it.

    Raises:
        NotFiniteError: weights of `down_proj` are NaN or infinite.
        ValueError: see `engine.quantize.quantize`.
    """
    own = format_of(model.model.embed_tokens.weight.dtype)
    source = _ModelSource(tensors_of(model), own, {} if copies is None else copies)
    return assemble(constants_of(model), source, format or own)


class _Tensors:
    """What both sources have: shapes and vectors of tensors by name."""

    def __init__(self, tensors: Mapping[str, Tensor | LazyTensor]) -> None:
        self._all = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        found = self._all.get(name)
        return None if found is None else tuple(found.shape)

    def vector(self, name: str) -> np.ndarray:
        found = self._all[name]
        return (found.load() if isinstance(found, LazyTensor) else found).float().contiguous().numpy()


class _ModelSource(_Tensors):
    def __init__(self, tensors: dict[str, Tensor], own: str, copies: dict[str, Matrix]) -> None:
        super().__init__(tensors)
        self._tensors, self._own, self._copies = tensors, own, copies

    def rows(self, name: str, format: str) -> Matrix:
        if format == self._own:
            return quantize(self._tensors[name], format)  # type: ignore[arg-type]
        if name not in self._copies:
            self._copies[name] = quantize(self._tensors[name], format)  # type: ignore[arg-type]
        return self._copies[name]

    def transposed(self, name: str, format: str) -> Matrix:
        if name not in self._copies:
            matrix = self._tensors[name]
            turned = pages.empty((matrix.shape[1], matrix.shape[0]), matrix.dtype).copy_(matrix.T)
            _check_rows(name, turned)
            self._copies[name] = quantize(turned, format)  # type: ignore[arg-type]
        return self._copies[name]


class _CheckpointSource(_Tensors):
    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__(tensors)
        self._tensors = tensors

    def rows(self, name: str, format: str) -> Matrix:
        lazy = self._tensors[name]
        return quantize_blocks(lazy.blocks(), (lazy.shape[0], lazy.shape[1]), format)

    def transposed(self, name: str, format: str) -> Matrix:
        lazy = self._tensors[name]
        shape = lazy.shape[1], lazy.shape[0]
        if format in PLAIN:
            out = pages.empty(shape, PLAIN[format])
            _fill_transposed(out, lazy, 0)
            _check_rows(name, out)
            return quantize(out, format)  # type: ignore[arg-type]
        return quantize_blocks(_transposed_blocks(name, lazy), shape, format)


def _transposed_blocks(name: str, lazy: LazyTensor) -> Iterator[Tensor]:
    """The transpose of a matrix from top to bottom, in few pieces, each of which reads the whole matrix once."""
    height, width = lazy.shape
    step = max(1, -(-width // MOST_READINGS), PIECE_BYTES // max(1, height * lazy.dtype.itemsize))
    for start in range(0, width, step):
        piece = torch.empty((min(step, width - start), height), dtype=lazy.dtype)
        _fill_transposed(piece, lazy, start)
        _check_rows(name, piece)
        yield piece


def _fill_transposed(out: Tensor, lazy: LazyTensor, start: int) -> None:
    """Write columns of a matrix (N, K), from column `start` on, to the rows of `out` (n, N)."""
    first = 0
    for block in lazy.blocks():
        out[:, first : first + len(block)] = block[:, start : start + len(out)].T
        first += len(block)


def copied(tensors: dict[str, Tensor], format: str, family: Family) -> dict[str, Tensor]:
    """The matrices of a model that `from_model` copies for a format; it shares the others."""
    own = format_of(tensors[f"{EMBEDDING}.weight"].dtype)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and (format != own or (name.endswith(DOWN) and not family.gated))
    }


def constants_of(model: PreTrainedModel) -> Constants:
    """The constants that the model's modules have now."""
    body = model.model
    first: Any = body.layers[0] if len(body.layers) else None
    family = family_of(model.config)
    return Constants(
        len(body.layers),
        describe(model.config).head_dim if first is None else first.self_attn.head_dim,
        model.config.intermediate_size if first is None else first.mlp.up_proj.weight.shape[0],
        norm_eps(body.norm),
        model.lm_head.weight is body.embed_tokens.weight,
        _frequencies(body.rotary_emb, model.config),
        body.rotary_emb.attention_scaling,
        family.gated,
        family.norm.offset,
    )


def constants_from_config(config: PreTrainedConfig) -> Constants:
    """The constants of a new model of this configuration."""
    shape, rotary = describe(config), rotary_of(config)
    return Constants(
        shape.layers,
        shape.head_dim,
        shape.ffn,
        shape.norm_eps,
        shape.tied,
        _frequencies(rotary, config),
        rotary.attention_scaling,
        shape.family.gated,
        shape.family.norm.offset,
    )


def _frequencies(rotary: torch.nn.Module, config: PreTrainedConfig) -> np.ndarray:
    """The frequencies of a rotation; where they are those of `frequencies` but for the rounding of torch's power
    function, which depends on the processor, they are those exactly."""
    found = rotary.get_buffer("inv_freq").detach().float().contiguous().cpu().numpy()
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if theta is None:
        return found
    exact = frequencies(2 * len(found), theta)
    return exact if np.allclose(found, exact, rtol=ROUNDING, atol=0) else found


def norm_eps(norm: torch.nn.Module) -> float:
    """The epsilon of a norm module, of this package or of transformers."""
    return getattr(norm, "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps")


def parts_of(layer: torch.nn.Module, family: Family) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules of a layer that have weights, with their names within it."""
    for part in family.layer:
        yield part.name, layer.get_submodule(part.name)


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that the model's modules use now, by their names in a checkpoint; a tied head too."""
    body, family = model.model, family_of(model.config)
    modules = {EMBEDDING: body.embed_tokens, NORM: body.norm, HEAD: model.lm_head}
    for index, layer in enumerate(body.layers):
        modules |= {f"model.layers.{index}.{name}": module for name, module in parts_of(layer, family)}
    found = {}
    for name, module in modules.items():
        for kind in ("weight", "bias"):
            tensor = getattr(module, kind, None)  # an embedding has no bias
            if tensor is not None:
                found[f"{name}.{kind}"] = tensor.detach()
    return found


def format_of(dtype: torch.dtype) -> str:
    """The plain format of a dtype."""
    return next(name for name, found in PLAIN.items() if found == dtype)


def from_checkpoint(folder: Path, format: Format | None = None) -> EngineWeights:
    """The weights of a Hugging Face folder, read tensor by tensor; memory holds them and one block.

    Args:
        folder: see `checkpoint.hf.open_hf`.
        format: that of the checkpoint's dtype if None.

    Raises:
        CheckpointError: something is missing or wrong with the folder.
        NotFiniteError: weights of `down_proj` are NaN or infinite.
        ValueError: see `engine.quantize.quantize`.
    """
    checkpoint = open_hf(folder)
    chosen = format or format_of(checkpoint.tensors[f"{EMBEDDING}.weight"].dtype)
    return assemble(constants_from_config(checkpoint.config), _CheckpointSource(checkpoint.tensors), chosen)


def _check_rows(name: str, matrix: Tensor) -> None:
    """Refuse NaN and infinity where rows of neurons that are zero are skipped: 0 times NaN is NaN."""
    if matrix.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(matrix)):
        raise NotFiniteError(f"some numbers of {name} are NaN or infinite")


def __getattr__(name: str) -> object:
    if name != "packed_bytes":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.packed_bytes is named weight_bytes now", DeprecationWarning, stacklevel=2)
    return weight_bytes
