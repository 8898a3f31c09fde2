"""Shapes of published models, as data."""

from __future__ import annotations

from typing import Any

# Shapes as published. Sources: NVIDIA's model cards and NeMo's nemotron.py (Nemotron3Config8B, Nemotron4Config15B,
# Nemotron4Config340B, Nemotron3Config4B); Minitron-8B's head_dim from its config.json.
PRESETS: dict[str, dict[str, Any]] = {
    "minitron-4b": {
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "minitron-8b": {
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "nemotron-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "initializer_range": 0.010,
    },
    "nemotron-4-15b": {
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "nemotron-4-340b": {
        "hidden_size": 18432,
        "intermediate_size": 73728,
        "num_hidden_layers": 96,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 192,
        "initializer_range": 0.0063,
    },
}
