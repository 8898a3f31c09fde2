"""Checkpoints of other formats as Hugging Face folders, converted once and cached."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .checkpoint.detect import detect
from .checkpoint.limits import CheckpointError
from .checkpoint.sources import adapted_model
from .convert import ConversionOptions, convert
from .files.cache_folder import cache_folder
from .version import __version__


def converted_folder(source: Path, say: Callable[[str], object] = lambda sentence: None) -> Path:
    """A Hugging Face folder with the model in `source`.

    Args:
        source: a checkpoint in another format.
        say: called with a message before a conversion.

    Raises:
        CheckpointError: see `convert.convert`.
    """
    kind = detect(source)
    target = cache_folder("converted") / f"{source.resolve().name}-{_state_of(source, kind)}"
    if (target / "config.json").is_file():
        return target
    name = "LoRA adapter and its base" if kind == "lora" else kind
    say(f"{source} ({name}) is converted to the Hugging Face layout once, into {target}")
    try:
        convert(source, target, ConversionOptions(to="hf"))
    except CheckpointError:
        if not (target / "config.json").is_file():  # another process may have converted it meanwhile
            raise
    return target


def _state_of(source: Path, kind: str) -> str:
    """Sixteen hex digits that change whenever a file of the checkpoint does.

    The hash includes the inode's change time: unlike the modification time, no program can set it back.
    """
    parts = [source, adapted_model(source)] if kind == "lora" else [source]
    files = [[str(path.resolve()), *_stat(path)] for part in parts for path in _files(part)]
    return hashlib.sha256(json.dumps([__version__, kind, files]).encode()).hexdigest()[:16]


def _stat(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        split = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.gguf", path.name)
        yield from sorted(path.parent.glob(f"{glob.escape(split[1])}-*-of-*.gguf")) if split else [path]
    else:
        yield from sorted(file for file in path.rglob("*") if file.is_file())
