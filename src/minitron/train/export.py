"""A trained model as a plain folder in the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.hf import save_config, save_model
from ..files import new_folder
from ..quiet import progress_bars
from ..world import World
from .adapters import merged_weights
from .extending import MODEL_FOLDER
from .sharded import whole_weights

__all__ = ["MODEL_FOLDER", "export_model"]


def export_model(
    model: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    world: World | None = None,
) -> None:
    """Write weights, config and tokenizer; adapters are merged into a copy of the weights.

    Args:
        model: the trained model; sharded, adapted or plain. It stays as it is.
        folder: the target; it appears when it is complete, and replaces an earlier export.
        dtype: of the weights; as they are if None.
        tokenizer: saved beside them if given.
        world: the processes of the run; all of them must call this.

    Raises:
        TargetError: the folder holds files that the export did not write.
        WriteError: the disk is full or refuses.
    """
    world = world or World()
    weights = whole_weights(model, world)
    world.first_does(lambda: _write(model, weights, folder, dtype, tokenizer))


def _write(
    model: Any, weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype | None, tokenizer: Any
) -> None:
    plain = model
    if hasattr(model, "peft_config"):
        plain, weights = model.get_base_model(), merged_weights(model)
    if dtype is not None:
        weights = {name: value.to(dtype) for name, value in weights.items()}
    with new_folder(folder, overwrite=True) as work:
        written = type(plain.config)(**plain.config.to_dict())
        written.dtype = next(iter(weights.values())).dtype
        with progress_bars(sum(value.nbytes for value in weights.values())):
            # A classifier's configuration may come from its base and name that one's class.
            written.architectures = save_model(plain, work, state_dict=weights)
        save_config(written, work)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
