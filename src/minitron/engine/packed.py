"""Packed weights: once for each model in memory, or in place of a model."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from ..model import NemotronForCausalLM
from ..quantize import Format
from .weights import EngineWeights, format_of, from_checkpoint, from_model

_packed: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, EngineWeights]]] = weakref.WeakKeyDictionary()
_packing = threading.Lock()


def weights_of(model: NemotronForCausalLM, format: str | None = None) -> EngineWeights:
    """The model's weights, packed at the first call and again whenever they have changed.

    Args:
        model: one that the engine runs.
        format: one of `quantize.FORMATS`; that of the model's dtype if None.

    Raises:
        ValueError: the weights are there in another format only.
    """
    if isinstance(model, PackedNemotron):
        (weights,) = _packed[model][1].values()
        if format not in (None, weights.format):
            raise ValueError(f"the model's weights are there in {weights.format} only, not in {format}")
        return weights
    own = format_of(model.model.embed_tokens.weight.dtype)
    now = _fingerprint(model)
    with _packing:
        found = _packed.get(model)
        if found is None or found[0] != now:
            found = now, {}
            _packed[model] = found
        name = format or own
        if name not in found[1]:
            found[1][name] = from_model(model, None if name == own else name)  # type: ignore[arg-type]
        return found[1][name]


def _fingerprint(model: NemotronForCausalLM) -> tuple[Any, ...]:
    # Versions count in-place changes, but not those made through `.data`: hence some values of what is copied.
    tensors = [(t.data_ptr(), t._version) for t in model.parameters()]
    samples = [
        part.detach().flatten()[:: max(1, part.numel() // 64)].float().sum().item()
        for name, part in model.named_parameters()
        if part.dim() == 1 or name.endswith("down_proj.weight")
    ]
    return (*tensors, *samples)


class PackedNemotron(NemotronForCausalLM):
    """A model whose weights are there only as `EngineWeights`: it takes the memory of these, and can only generate."""

    @property
    def device(self) -> torch.device:
        """Where it decodes; its parameters are nowhere."""
        return torch.device("cpu")

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refused: the engine decodes, and nothing else reads packed weights.

        Raises:
            ValueError: always.
        """
        reason = f", which cannot serve this: {self.last_generation.reason}" if self.last_generation else ""
        raise ValueError(f"packed weights are decoded by the engine alone{reason}; load the model without a format")


def packed_model(folder: Path, format: Format | None = None) -> PackedNemotron:
    """A folder's model with nothing in memory but its weights in a format; see `weights.from_checkpoint`."""
    weights = from_checkpoint(folder, format)
    with torch.device("meta"):
        model = PackedNemotron(weights.config).eval()
    model.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    _packed[model] = None, {weights.format: weights}
    return model
