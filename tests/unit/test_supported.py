"""Configurations of files that are refused, each with a sentence, and those that are not."""

from __future__ import annotations

from typing import Any

import pytest
from family_samples import KINDS, kind_config

from minitron.supported import check_supported

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "gpt2"}, r"model_type is 'gpt2'; .* LlamaForCausalLM"),
    "no architecture": ({}, "model_type is None"),
    "not a name": ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
    "Mixtral": ({"model_type": "mixtral", "num_local_experts": 8}, r"mixture of experts \(num_local_experts is 8\)"),
    "Qwen3 with experts": ({"model_type": "qwen3_moe", "num_experts": 128}, r"mixture of experts \(num_experts is 128"),
    "experts under a dense name": ({**LLAMA, "num_experts": 4}, "mixture of experts"),
    "Nemotron-H": (
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*"}, r"Mamba layers \(hybrid_override_pattern"
    ),
    "Mamba": ({"model_type": "mamba2", "state_size": 128}, "Mamba layers"),
    "Puzzle": ({**LLAMA, "block_configs": [{}, {}]}, "layers of different shapes"),
    "a list of sizes": ({**LLAMA, "intermediate_size": [48, 64]}, r"intermediate_size is \[48, 64\]: layers of diff"),
    "no heads": ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads is 0; it must be"),
    "uneven groups": ({**LLAMA, "num_key_value_heads": 3}, r"num_attention_heads \(4\) is not a multiple of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_how(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_supported(values)


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_the_table_pass(kind: str) -> None:
    config = kind_config(kind)
    assert check_supported(config.to_dict()).model_type == config.model_type
