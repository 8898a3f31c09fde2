"""A checkpoint, checked, as a model with its tokenizer, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .assets import BUNDLED, bundled_model
from .checkpoint.hf import check_checkpoint, read_config
from .config import NemotronConfig
from .engine.memory import require_memory
from .model import NemotronForCausalLM
from .quantize import FORMATS
from .tokenizer import load_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Loaded(NamedTuple):
    """What `load` returns."""

    model: NemotronForCausalLM
    tokenizer: PreTrainedTokenizerBase


def load(
    path: str | Path | None = None, dtype: str = "auto", device: str = "auto", format: str | None = None
) -> Loaded:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        path: folder of a checkpoint in the Hugging Face layout, a repository id, "bundled" or "bundled-half"; the
            bundled model if None.
        dtype: "auto" (the checkpoint's own), "bf16", "fp16" or "fp32".
        device: "auto" (CUDA where there is one, otherwise the CPU) or a name that torch knows.
        format: load only what decoding on the CPU reads, in this format ("bf16", "fp32", "bf12", "int8" or "int4"): the
            least memory; the model can generate and nothing else.

    Raises:
        FileNotFoundError, ValueError: something is missing or wrong; the message names the file, the field, what was
            found and what was expected. Nothing is ever filled with random numbers.
    """
    source = bundled_model() if path is None else resolve(path)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be auto, {', '.join(DTYPES)}")
    if format is not None:
        return _load_packed(source, dtype, device, format)
    if isinstance(source, Path):
        check_checkpoint(source)
        if device == "cpu" or not torch.cuda.is_available():
            config = read_config(source)
            require_memory(str(source), config, _format_name(config, dtype), packed=False)
    model, info = NemotronForCausalLM.from_pretrained(source, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{source}: tensor {sorted(info['missing_keys'])[0]!r} is missing from the checkpoint")
    tokenizer = load_tokenizer(source, vocab_size=model.config.vocab_size)
    return Loaded(model.to(pick_device(device)).eval(), tokenizer)


def _format_name(config: NemotronConfig, dtype: str) -> str:
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    wanted = DTYPES.get(dtype, stored)
    return next((name for name, known in DTYPES.items() if known == wanted), "fp32")


def _load_packed(source: Path | str, dtype: str, device: str, format: str) -> Loaded:
    from .engine.packed import packed_model  # needs more than a model of torch does

    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if not isinstance(source, Path):
        raise ValueError(f"{source}: a format needs the checkpoint's folder; download it first (hf download {source})")
    if device not in ("auto", "cpu") or dtype != "auto":
        raise ValueError(f"format {format} was given with device {device!r} and dtype {dtype!r}; leave both out")
    check_checkpoint(source)
    require_memory(str(source), read_config(source), format, packed=True)
    model = packed_model(source, format)  # type: ignore[arg-type]
    return Loaded(model, load_tokenizer(source, vocab_size=model.config.vocab_size))


def resolve(path: str | Path) -> Path | str:
    """A folder, or what "bundled" and "bundled-half" mean, as a `Path`; `nvidia/Minitron-4B-Base` and the like as is.

    Raises:
        FileNotFoundError: neither an existing folder nor the form of a repository id.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    text = str(path)
    if text in BUNDLED:
        return bundled_model(BUNDLED[text])
    if folder.exists():
        raise FileNotFoundError(f"{text}: a file; expected the folder of a checkpoint with config.json")
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/"):
        return text
    raise FileNotFoundError(f"{text}: no such folder; expected a checkpoint folder or a repository id (owner/name)")


def pick_device(device: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one.

    Raises:
        ValueError: torch knows no such device, or it is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from error
    return found
