"""Small models for tests, and the same ones built by upstream transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.nemotron import configuration_nemotron as upstream_configuration
from transformers.models.nemotron import modeling_nemotron as upstream

import minitron
from minitron import NemotronConfig

CLASSES = (
    "NemotronModel",
    "NemotronForCausalLM",
    "NemotronForSequenceClassification",
    "NemotronForQuestionAnswering",
    "NemotronForTokenClassification",
)
UpstreamConfig = upstream_configuration.NemotronConfig

# What differs between the models of the family, in small: grouped queries, one key/value head per query head, and
# Minitron-8B's heads * head_dim != hidden_size with biases everywhere.
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "wide": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12},
    "biased": {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 1.0},
}


def tiny(**overrides: Any) -> NemotronConfig:
    """Two layers, hidden 32, four query heads of 8 in two groups, 96 tokens."""
    return NemotronConfig(**{**_TINY, **overrides})


_TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def upstream_tiny(**overrides: Any) -> Any:
    """The configuration of `tiny`, of upstream's class."""
    return UpstreamConfig(**{**_TINY, **overrides})


def scramble(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Fill every parameter with noise: biases too, and layer-norm weights as small as trained ones are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            scale = 0.05 if "norm" in name else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def build(name: str = "NemotronForCausalLM", attn: str | None = None, seed: int = 0, **overrides: Any) -> Any:
    """One of our classes with random weights, in evaluation mode."""
    config = tiny(**overrides)
    if attn is not None:
        config._attn_implementation = attn
    return scramble(getattr(minitron, name)(config), seed).eval()


def pair(name: str = "NemotronForCausalLM", attn: str = "sdpa", seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
    """The same weights in our class and in upstream's."""
    ours = build(name, attn, seed, **overrides)
    config = upstream_tiny(**overrides)
    config._attn_implementation = attn
    theirs = getattr(upstream, name)(config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def token_ids(batch: int = 2, length: int = 9, vocab: int = 96, seed: int = 0, low: int = 5) -> Tensor:
    """Random ids above the special ones."""
    return torch.randint(low, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor) -> float:
    """Root of the mean square, in float64."""
    return x.double().square().mean().sqrt().item()
