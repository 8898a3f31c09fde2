"""A checkpoint, checked, as a model with its tokenizer, ready to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .checkpoint.detect import detect
from .checkpoint.hf import check_checkpoint, read_config
from .config import ModelConfig
from .converted import converted_folder
from .dtypes import dtype_name, parse_dtype, short_name
from .engine.cuda.device import why_no_device
from .engine.matrix import CUDA_FORMATS, FORMATS
from .engine.memory import require_device_memory, require_memory
from .families import family_of
from .family_models import causal_lm_class
from .locate import fetch, locate
from .pages import align
from .quiet import progress_bars
from .shapes import describe
from .tokenizer import load_tokenizer


class Loaded(NamedTuple):
    """What `load` returns."""

    model: Any
    """`NemotronForCausalLM`, or the class of transformers of another family with this package's `generate`."""
    tokenizer: PreTrainedTokenizerBase


def load(
    path: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    format: str | None = None,
    say: Callable[[str], object] = lambda sentence: None,
) -> Loaded:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        path: a checkpoint of an architecture in `families`, in any format that `minitron convert` reads, a LoRA
            adapter's folder, a repository id, "bundled" or "bundled-half"; the bundled model if None.
        dtype: "auto" (the checkpoint's own), "bf16", "fp16" or "fp32", or the dtype itself.
        device: "auto" (CUDA where there is one, otherwise the CPU) or a name that torch knows.
        format: load only the weights that decoding reads, in this format ("bf16", "fp32", "int8", "int4", or on the
            CPU "bf12"). This takes the least memory; the model can only generate.
        say: see `checkpoint_folder`.

    Raises:
        FileNotFoundError, ValueError: something is missing or wrong; the message names the file, the field, what was
            found and what was expected. Missing tensors are never filled with random numbers.
    """
    chosen = parse_dtype(dtype)
    format = short_name(format.lower()) if format else format
    place = pick_device(device)
    source = checkpoint_folder(path, say)
    if format is not None:
        return _load_generation_only(source, chosen, device, format)
    needed = check_checkpoint(source)
    config = read_config(source)
    if place.type == "cpu":
        require_memory(str(source), config, _format_name(config, chosen), generation_only=False)
    elif place.type == "cuda":
        require_device_memory(str(source), config, _format_name(config, chosen), False, place)
    with progress_bars(describe(config).num_parameters() * 2):
        wanted = chosen or needed or "auto"
        kind = causal_lm_class(family_of(config))
        model, info = kind.from_pretrained(source, dtype=wanted, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{source}: tensor {sorted(info['missing_keys'])[0]!r} is missing from the checkpoint")
    tokenizer = load_tokenizer(source, vocab_size=model.config.vocab_size)
    model = model.to(place).eval()
    align(model)
    return Loaded(model, tokenizer)


def _format_name(config: ModelConfig, dtype: torch.dtype | None) -> str:
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return dtype_name(dtype or stored) or "fp32"


def _load_generation_only(source: Path, dtype: torch.dtype | None, device: str, format: str) -> Loaded:
    from .engine.model_weights import generation_only_model  # imports more than loading a torch model needs

    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    place = pick_device(device)
    if device == "auto" and format not in CUDA_FORMATS:
        place = torch.device("cpu")
    if dtype is not None:
        raise ValueError(f"format {format} and dtype {dtype} were both given; leave one of them out")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"format {format} was given with device {device!r}; it must be cpu or cuda")
    if place.type == "cuda" and format not in CUDA_FORMATS:
        raise ValueError(f"format {format} is for the CPU; on {place} it must be one of {', '.join(CUDA_FORMATS)}")
    check_checkpoint(source)
    config = read_config(source)
    require_memory(str(source), config, format, generation_only=True)
    if place.type == "cuda":
        require_device_memory(str(source), config, format, True, place)
    model = generation_only_model(source, format, place)  # type: ignore[arg-type]
    return Loaded(model, load_tokenizer(source, vocab_size=model.config.vocab_size))


def checkpoint_folder(model: str | Path | None = None, say: Callable[[str], object] = lambda sentence: None) -> Path:
    """The folder in the Hugging Face layout of any model that `locate` knows.

    A repository is fetched. A checkpoint in another format (GGUF, NeMo, Megatron, a LoRA adapter with its base) is
    converted once, into `$MINITRON_CACHE` (`~/.cache/minitron`), and again when one of its files has changed.

    Args:
        model: see `locate.locate`.
        say: called with a sentence before a conversion, which takes a while for a large model.

    Raises:
        FileNotFoundError: there is no such model.
        CheckpointError: it cannot be read or converted.
    """
    found = locate(model)
    folder = found if isinstance(found, Path) else fetch(found)
    return folder if detect(folder) == "hf" else converted_folder(folder, say)


def pick_device(device: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one.

    Raises:
        ValueError: torch does not know the device, or the machine does not have it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        missing = why_no_device(found) if found.type == "cuda" else ""
        if missing:
            raise RuntimeError(missing)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from error
    return found
