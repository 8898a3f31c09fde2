"""Models to customize, in fp32: a language model, or its backbone under a new head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from ..checkpoint.hf import check_checkpoint
from ..registration import register
from ..train.inputs import saved_model

CLASSES: dict[str, Any] = {"sequence-classification": AutoModelForSequenceClassification}
"""Heads by the names of transformers' tasks."""


def language_model(folder: Path, device: Any) -> nn.Module:
    """The language model of a checkpoint folder in fp32."""
    return saved_model(folder, device)


def pad_id(tokenizer: Any) -> int:
    """The id at padding: the tokenizer's own; else that of the end of a text."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    raise ValueError("the tokenizer has no padding token and no end-of-text token, so texts cannot share a batch")


def head_model(
    folder: Path, tokenizer: Any, head: str, config: dict[str, Any], seed: int, device: Any
) -> tuple[nn.Module, int]:
    """A checkpoint's backbone in fp32 under a head, and the id at padding.

    Args:
        folder: of a language model, or of a model with that head, whose weights are then kept if they fit.
        tokenizer: its tokenizer.
        head: key of `CLASSES`.
        config: fields of the configuration, such as `num_labels`.
        seed: determines the weights of a new head.
        device: where the model goes.
    """
    check_checkpoint(folder)
    register()
    pad = pad_id(tokenizer)
    torch.manual_seed(seed)
    model = CLASSES[head].from_pretrained(
        folder, dtype=torch.float32, ignore_mismatched_sizes=True, **config, pad_token_id=pad
    )
    return model.to(device), pad
