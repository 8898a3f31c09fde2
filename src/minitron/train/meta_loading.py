"""Loading onto the meta device: a model without weights, of which each process reads its own part after sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..checkpoint.hf import read_config, read_tensors
from ..checkpoint.tensors import LazyTensor
from ..families import family_of
from ..family_models import causal_lm_class, rotary_of
from .optimizers import placed_like

_SOURCE = "_minitron_weights"


def unloaded_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a checked checkpoint folder with parameters on the meta device; `load_weights` fills them.

    None if the tensors of the folder do not match its parameters one to one (tied or renamed ones).
    """
    config = read_config(folder)
    tensors = read_tensors(folder)
    if config.tie_word_embeddings:
        return None
    config.dtype = dtype
    with torch.device("meta"):
        model = causal_lm_class(family_of(config))._from_config(config, dtype=dtype)
    if any(name not in tensors for name, _ in model.named_parameters()):
        return None
    setattr(model, _SOURCE, tensors)
    return model.eval()  # as `from_pretrained` returns it


@torch.no_grad()
def load_weights(model: nn.Module | None, device: torch.device) -> None:
    """Read the weights of an `unloaded_model`, sharded or not, onto a device; other models stay as they are."""
    tensors: dict[str, LazyTensor] | None = getattr(model, _SOURCE, None)
    if model is None or tensors is None:
        return
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model.to_empty(device=device)
    fresh = rotary_of(model.config).to(device)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, type(fresh)):
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
        parameter.copy_(_own_part(tensors[name], parameter))
    delattr(model, _SOURCE)


def _own_part(tensor: LazyTensor, like: Any) -> Tensor:
    """The part of a tensor on disk that belongs to a parameter of this process."""
    if not isinstance(like, DTensor) or list(like.placements) != [Shard(0)]:
        return placed_like(tensor.load(), like)
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    rows = tensor.rows(offset[0], offset[0] + shape[0]) if shape[0] else like.to_local()
    return DTensor.from_local(
        rows.to(like.device), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
