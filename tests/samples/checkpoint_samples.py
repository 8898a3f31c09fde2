"""Small checkpoints for tests, written without the code under test."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from minitron.checkpoint.names import hf_shapes
from minitron.config import NemotronConfig


def tiny_config(**overrides: object) -> NemotronConfig:
    """48-heads-like: heads * head_dim is not hidden_size, groups of three query heads, a rotary width of six."""
    values = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 64,
        "dtype": "float32",
        "architectures": ["NemotronForCausalLM"],
        **overrides,
    }
    return NemotronConfig(**values)  # type: ignore[arg-type]


def random_state(config: NemotronConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in hf_shapes(config).items()
    }


def save_reference(folder: Path, config: NemotronConfig, state: dict[str, torch.Tensor]) -> Path:
    """A folder written by the safetensors library, not by the code under test."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def data_folder() -> Path | None:
    """Checkpoints and texts made by others; see docs/formats.md. None where they are not at hand."""
    places = [os.environ.get("MINITRON_DATA"), Path(__file__).parents[3] / "shared" / "datasets"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def sentencepiece_model(folder: Path, **options: object) -> Path:
    """A small SentencePiece model in the manner of Nemotron's: special ids 0 to 3, chat tags, byte fallback."""
    import sentencepiece

    text = "the quick brown fox jumps over a lazy dog while seven wizards quietly brew strange potions"
    words = text.split()
    lines = [" ".join(words[(i * k) % len(words)] for i in range(9)) for k in range(1, 200)]
    settings = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "unk_id": 1,
        "bos_id": 2,
        "eos_id": 3,
        "pad_id": 0,
        "user_defined_symbols": ["<extra_id_0>", "<extra_id_1>"],
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        **options,
    }
    prefix = folder / "spm"
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(prefix), **settings)
    return prefix.with_suffix(".model")
