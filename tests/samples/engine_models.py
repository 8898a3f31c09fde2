"""Small models for the engine's tests, with weights large enough for logits to differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from checkpoint_samples import random_state, tiny_config

from minitron import NemotronForCausalLM
from minitron.engine.matrix import Matrix
from minitron.engine.quantize import quantize
from minitron.engine.weights import EngineWeights

VARIANTS = {
    "odd heads": {},
    "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "no rotation": {"partial_rotary_factor": 0.0, "num_hidden_layers": 1},
    "full rotation, one kv head": {"partial_rotary_factor": 1.0, "num_key_value_heads": 1},
    "odd widths": {"hidden_size": 33, "head_dim": 10, "intermediate_size": 131, "vocab_size": 97},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "partial_rotary_factor": 1.0,
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "partial_rotary_factor": 1.0,
    },
    "no layers": {"num_hidden_layers": 0},
}


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object) -> NemotronForCausalLM:
    config = tiny_config(**overrides)
    state = {name: 4 * value for name, value in random_state(config, seed=seed).items()}
    model = NemotronForCausalLM(config)
    model.load_state_dict(state, strict=not config.tie_word_embeddings)
    return model.to(dtype).eval()


def some_tokens(count: int, vocabulary: int = 96, seed: int = 1) -> list[int]:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(engine: Any, tokens: list[int], read: int, piece: int) -> torch.Tensor:
    """Logits after each token from `read` on, asked for in pieces."""
    engine.prefill(tokens[:read])
    pieces = [engine.step(tokens[i : i + piece]).clone() for i in range(read, len(tokens), piece)]
    engine.close()
    return torch.cat(pieces)


def unpacked(weights: EngineWeights) -> EngineWeights:
    """The same numbers in fp32."""

    def wide(matrix: Matrix | None) -> Matrix | None:
        return None if matrix is None else quantize(matrix.dense(torch.float32), "fp32")

    names = ("q", "k", "v", "o", "up", "down", "gate")
    layers = [replace(layer, **{name: wide(getattr(layer, name)) for name in names}) for layer in weights.layers]
    ends: dict[str, Any] = {"embed": wide(weights.embed), "head": wide(weights.head)}
    return replace(weights, format="fp32", layers=layers, **ends)
