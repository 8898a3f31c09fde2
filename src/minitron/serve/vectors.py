"""Embeddings: the mean of the last hidden states of a text, of length 1."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch

from ..engine.model_weights import GenerationOnly
from .errors import ApiError, failed
from .served import ServedModel


def embed(model: ServedModel, ids: list[int]) -> list[float]:
    """The embedding of one text. Each text is a batch of its own, so that it does not depend on others.

    Raises:
        ApiError: the text has no tokens or too many, or the model was loaded for generation only.
    """
    network: Any = model.model
    if isinstance(network, GenerationOnly):
        raise ApiError(
            f"the model {model.name!r} was loaded in a format for generation only; start the server without --format",
            param="model",
            code="no_embeddings",
        )
    if not 0 < len(ids) <= model.context:
        raise ApiError(
            f"an input has {len(ids)} tokens; the model {model.name!r} takes 1 to {model.context}",
            param="input",
            code="context_length_exceeded",
        )
    with torch.inference_mode():
        hidden = network.base_model(input_ids=torch.tensor([ids], device=network.device)).last_hidden_state
        mean = hidden[0].double().mean(0)
        vector = (mean / mean.norm().clamp_min(1e-12)).tolist()
    if not all(map(math.isfinite, vector)):
        raise failed("the model computes NaN for this text")
    return vector


def encoded(vector: list[float], form: str | None) -> list[float] | str:
    """A vector as numbers, or as base64 of little-endian fp32."""
    if form != "base64":
        return vector
    return base64.b64encode(torch.tensor(vector, dtype=torch.float32).numpy().astype("<f4").tobytes()).decode()
