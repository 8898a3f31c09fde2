"""The engine's weights of a model in memory, and a model that consists of engine weights alone.

Nothing is assumed about how a model was changed between two calls: through `.data`, a numpy view, another process's
shared memory. Its modules are compared with those of the call before (`snapshot`), or read anew. Matrices that the
engine shares with the model are never out of date; of those that it copies (`down_proj` in a plain format, all in a
quantized one) each call computes a checksum, and vectors are compared number by number.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..checkpoint.hf import read_config
from ..engine_hook import ENGINE_CHOICE, REPORT
from ..families import Family, family_of
from ..family_models import causal_lm_class, class_prefix, rotary_of
from .checksums import Checksum, checksums
from .matrix import Format, Matrix
from .snapshot import MOST_BYTES, Snapshot
from .weights import EngineWeights, constants_of, copied, format_of, from_checkpoint, from_model, tensors_of


@dataclass
class _Copies:
    """The engine's copies of a model's matrices in one format, by the names of parameters."""

    sums: dict[str, Checksum] = field(default_factory=dict)
    matrices: dict[str, Matrix] = field(default_factory=dict)
    kept: _Kept | None = None
    """Of a small model."""


class _Kept:
    """The weights of a model at one call, with what the next call compares before it uses them again."""

    def __init__(
        self, model: PreTrainedModel, weights: EngineWeights, copied: dict[str, Tensor], sums: dict[str, Checksum]
    ) -> None:
        self._snapshot = Snapshot(model)
        self._vectors: dict[torch.dtype, list[Tensor]] = {}
        for vector in self._snapshot.vectors:
            self._vectors.setdefault(vector.dtype, []).append(vector)
        self._numbers = self._read_vectors()
        self._weights, self._copied, self._sums = weights, copied, sums

    def _read_vectors(self) -> list[bytes]:
        parts = [torch.cat([vector.detach().reshape(-1) for vector in same]) for same in self._vectors.values()]
        return [part.view(torch.uint8).numpy().tobytes() for part in parts]

    def of(self, model: PreTrainedModel) -> EngineWeights | None:
        """The weights if they are still those of the model."""
        same = (
            self._snapshot.holds(model)
            and self._numbers == self._read_vectors()
            and self._sums == checksums(self._copied)
        )
        return replace(self._weights) if same else None


_copies: weakref.WeakKeyDictionary[nn.Module, dict[str, _Copies]] = weakref.WeakKeyDictionary()
_copying = threading.Lock()


def weights_of(model: PreTrainedModel, format: str | None = None) -> EngineWeights:
    """The model's weights as they are now. Copies are made at the first call, and of what has changed since.

    Args:
        model: one that the engine runs, see `models.why_not_model`.
        format: one of `engine.matrix.FORMATS`; that of the model's dtype if None.

    Raises:
        ValueError: the model has its weights in another format only.
    """
    if isinstance(model, GenerationOnly):
        weights = model.engine_weights(format)
        if not decodes_on_cuda(model):
            return weights
        from .cuda.weights import kept_weights

        return kept_weights(model, weights)
    if decodes_on_cuda(model):
        from .cuda.weights import device_weights

        return device_weights(model, format)
    name = format or format_of(model.model.embed_tokens.weight.dtype)
    with _copying:
        formats = _copies.setdefault(model, {})
        before = formats.get(name, _Copies())
        weights = None if before.kept is None else before.kept.of(model)
        if weights is None:
            tensors = tensors_of(model)
            unshared = copied(tensors, name, family_of(model.config))
            sums = checksums(unshared)
            same = {key: matrix for key, matrix in before.matrices.items() if sums.get(key) == before.sums[key]}
            before.kept = None
            weights = from_model(model, name, same)  # type: ignore[arg-type]
            kept = _Kept(model, weights, unshared, sums) if weights.nbytes <= MOST_BYTES else None
            formats[name] = _Copies(sums, same, kept)
        return weights


def decodes_on_cuda(model: PreTrainedModel) -> bool:
    """Whether the model's engine is that for CUDA: it is on a GPU, or `generate` was told `engine="cuda"`."""
    return ENGINE_CHOICE.get() == "cuda" or model.device.type == "cuda"


def has_copies(model: PreTrainedModel, format: str) -> bool:
    """Whether the model's matrices were copied in a format, so that only those that changed since are copied anew."""
    if decodes_on_cuda(model):
        from .cuda.weights import has_device_copies

        return has_device_copies(model, format)
    with _copying:
        return bool(_copies.get(model, {}).get(format, _Copies()).matrices)


class AbsentParameter(nn.Parameter):
    """A parameter whose values are in `EngineWeights` only: it has a shape and a dtype, and refuses all else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Attributes that need no values.

        Raises:
            ValueError: anything else.
        """
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")  # `__get__` of a property's descriptor
        if (owner or name) in _FACTS and name != "__set__":
            return super().__torch_function__(func, types, args, kwargs or {})
        raise ValueError(
            f"this model was loaded in a format, so its weights can be neither read nor changed "
            f"({owner or name}); load it without a format, change it, and save it"
        )


_SHAPE = frozenset(("shape", "size", "numel", "nelement", "dim", "ndim", "stride", "is_contiguous", "__len__", "names"))
_KIND = frozenset(
    ("dtype", "device", "layout", "itemsize", "nbytes", "element_size", "is_floating_point", "is_complex")
)
_STATE = frozenset(("requires_grad", "is_leaf", "grad", "grad_fn", "_version", "__hash__", "__repr__"))
_WHERE = frozenset(("is_meta", "is_sparse", "is_quantized", "is_cpu", "is_cuda"))
_FACTS = _SHAPE | _KIND | _STATE | _WHERE


class GenerationOnly:
    """A model that has its weights only as `EngineWeights`: it takes the memory of these, and can only generate.

    Goes before the class of a family, as `generation_only_class` combines them.
    """

    def __init__(self, weights: EngineWeights, config: Any) -> None:
        with torch.device("meta"):
            super().__init__(config)  # type: ignore[call-arg] (the class of the family)
        self._engine_weights = weights
        model: Any = self
        model.model.rotary_emb = rotary_of(config)
        absent: dict[nn.Parameter, AbsentParameter] = {}  # a tied head stays the embedding
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = absent.setdefault(parameter, AbsentParameter(parameter.data))

    @property
    def device(self) -> torch.device:
        """Where it decodes. Its parameters are on no device."""
        return self._engine_weights.embed.data.device

    def engine_weights(self, format: str | None = None) -> EngineWeights:
        """The weights, with the constants that the modules have now.

        Raises:
            ValueError: the model has them in another format only.
        """
        if format not in (None, self._engine_weights.format):
            raise ValueError(f"the model has its weights in {self._engine_weights.format} only, not in {format}")
        return replace(self._engine_weights, constants=constants_of(self))  # type: ignore[arg-type]

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refused: only the engine reads these weights.

        Raises:
            ValueError: always.
        """
        report = REPORT.get()
        reason = f", which cannot serve this: {report.reason}" if report is not None and report.reason else ""
        raise ValueError(
            f"a model that was loaded in a format runs in the engine only{reason}; load it without a format"
        )


@cache
def generation_only_class(family: Family) -> type[Any]:
    """The class of a family's models that have only engine weights; a subclass of `causal_lm_class`."""
    name = f"GenerationOnly{class_prefix(family)}"
    return type(
        name, (GenerationOnly, causal_lm_class(family)), {"__module__": __name__, "__doc__": GenerationOnly.__doc__}
    )


def generation_only_model(folder: Path, format: Format | None = None, device: torch.device | None = None) -> Any:
    """A folder's model, with only its weights in a format in memory; see `weights.from_checkpoint`.

    Args:
        folder: in the Hugging Face layout.
        format: of the weights; that of the checkpoint's dtype if None.
        device: where it decodes; the CPU if None.

    Raises:
        ValueError: see `weights.from_checkpoint`, and `cuda.weights.on_device`.
    """
    config = read_config(folder)
    weights = from_checkpoint(folder, format)
    if device is not None and device.type != "cpu":
        from .cuda.weights import on_device

        weights = on_device(weights, device)
    model = generation_only_class(family_of(config))(weights, config).eval()
    model.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
