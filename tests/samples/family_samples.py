"""Small models of every family, with random weights, made by the classes that define them: transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from model_samples import scramble
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minitron import NemotronConfig, NemotronForCausalLM

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "nemotron": NemotronConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
MODELS: dict[str, type[PreTrainedModel]] = {
    "nemotron": NemotronForCausalLM,
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
RELATIVES = tuple(name for name in CONFIGS if name != "nemotron")

# What a family adds to the usual small shape: the settings that only it has.
_OWN: dict[str, dict[str, Any]] = {
    "nemotron": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}

# Kinds of models that exist, in small: (family, settings). Llama 3 scales its rotary embedding, SmolLM2 has tied
# embeddings and three groups, Qwen3's heads are wider than hidden / heads, and Qwen2 and old Llamas have biases.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron": ("nemotron", {}),
    "llama": ("llama", {}),
    "llama-3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "smollm": ("llama", {"tie_word_embeddings": True, "hidden_size": 36, "num_attention_heads": 6, "head_dim": 6}),
    "mistral": ("mistral", {"head_dim": 10}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 14}),
    "qwen3-biased": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}  # fmt: skip


def small_config(family: str, **overrides: Any) -> Any:
    """Two layers, hidden 32, four query heads of 8 in two groups, 96 tokens."""
    usual = {
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
    return CONFIGS[family](**{**usual, **_OWN[family], **overrides})


def kind_config(kind: str, **overrides: Any) -> Any:
    """The configuration of one of `KINDS`."""
    family, settings = KINDS[kind]
    return small_config(family, **{**settings, **overrides})


def small_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of that configuration with noise in every parameter, in evaluation mode."""
    model = scramble(MODELS[config.model_type](config), seed)
    if config.model_type != "nemotron":  # gains of RMS norms are around 1, not around 0
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data += 1
    return model.to(dtype).eval()


@st.composite
def configs(draw: st.DrawFn, families: tuple[str, ...] = RELATIVES) -> Any:
    """Any small configuration of a family: biases, tied embeddings, unusual head sizes, one group or many."""
    family = draw(st.sampled_from(families))
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * per_group
    head_dim = 2 * draw(st.integers(1, 7)) + (draw(st.booleans()) if family == "nemotron" else 0)
    settings: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "hidden_size": heads * draw(st.integers(1, 6)) if family == "llama" else draw(st.integers(2, 40)),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(8, 60)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    for name in ("attention_bias", "mlp_bias"):
        if hasattr(CONFIGS[family], name):
            settings[name] = draw(st.booleans())
    return small_config(family, **settings)
