"""Adapters after training: the check that the merged model computes the same, and the folder that peft reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import new_folder
from ..train.inputs import saved_model
from .models import head_of, saved_head

ADAPTER_FOLDER = "adapter"


@torch.no_grad()
def merging_error(adapted: Any, merged: Path, ids: Tensor) -> tuple[float, float]:
    """How far the logits of a merged model are from those of the model with its adapters beside the weights.

    Args:
        adapted: the trained model, wrapped by peft.
        merged: the folder of the merged model.
        ids: (B, T) tokens to compare on.

    Returns:
        The largest difference, and the largest logit, both absolute.
    """
    head, device = head_of(merged), next(adapted.parameters()).device
    other = saved_model(merged, device) if head is None else saved_head(merged, head, torch.float32, device)
    adapted.eval()
    before, after = (_logits(model, ids.to(device)) for model in (adapted, other.eval()))
    return float((before - after).abs().max()), float(before.abs().max())


def _logits(model: Any, ids: Tensor) -> Tensor:
    out = model(input_ids=ids)
    return (out.start_logits if hasattr(out, "start_logits") else out.logits).float()


def save_adapter(adapted: Any, folder: Path, base: Path) -> None:
    """Write the adapters alone, as peft does, with the folder of the model that they belong to."""
    for settings in adapted.peft_config.values():
        settings.base_model_name_or_path = str(base.absolute())
    with new_folder(folder, overwrite=True) as work:
        adapted.save_pretrained(work)
        (work / "README.md").unlink(missing_ok=True)  # an empty form
