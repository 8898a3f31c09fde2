"""Detect the format of a checkpoint by the names of its files. Reads four bytes at most, and imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from .limits import CheckpointError, require

FORMATS = ("hf", "lora", "nemo", "nemo2", "megatron", "gguf")

ADAPTER_CONFIG = "adapter_config.json"


def detect(path: Path) -> str:
    """The format of a checkpoint.

    Returns:
        "hf" (folder with config.json), "lora" (adapter folder of peft), "nemo", "nemo2", "megatron" (a bare
        distributed folder) or "gguf".

    Raises:
        CheckpointError: the path does not exist, or its format is unknown.
    """
    require(path.exists(), f"{path}: no such file or folder")
    if path.is_file():
        if is_gguf(path):
            return "gguf"
        loose = path.suffix in (".safetensors", ".bin", ".json", ".model")
        require(not loose, f"{path}: pass the folder that holds config.json, not one file of it")
        return "nemo"  # a tar, plain or gzip; the reader says what is wrong if it is not
    if (path / "context").is_dir() or (path / "weights" / ".metadata").is_file():
        return "nemo2"
    ranks = any(path.glob("*/model_weights.ckpt")) or any(path.glob("mp_rank_*/model_optim_rng.pt"))
    if (path / "model_config.yaml").is_file() or (path / "model_weights").exists() or ranks:
        return "nemo"
    if (path / ".metadata").is_file() or (path / "metadata.json").is_file() or any(path.glob("*/.zarray")):
        return "megatron"
    if (path / "config.json").is_file():
        return "hf"
    if (path / ADAPTER_CONFIG).is_file():
        return "lora"
    found = sorted(file.name for file in path.glob("*.gguf"))
    require(not found, f"{path}: a folder with {', '.join(found[:3])}; pass the file (of several parts, any one)")
    raise CheckpointError(
        f"{path}: no checkpoint in it; expected config.json (Hugging Face), {ADAPTER_CONFIG} (LoRA), "
        f"model_config.yaml (NeMo 1), context/ (NeMo 2) or metadata.json (Megatron)"
    )


def is_gguf(path: Path) -> bool:
    """Whether a file begins like GGUF."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
