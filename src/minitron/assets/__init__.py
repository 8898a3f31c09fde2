"""Files that come with the package: the default model with its tokenizer, and the chat template."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def bundled_model() -> Path:
    """Folder of the default model, in the Hugging Face layout; its README.md tells what it was trained on.

    Raises:
        FileNotFoundError: the package was installed without it.
    """
    folder = _FOLDER / "default"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: the bundled model is missing; install minitron again, or name a checkpoint")
    return folder


def chat_template() -> str:
    """The Jinja template of the Nemotron-Mini prompt format, with tools, tool calls and tool results."""
    return (_FOLDER / "nemotron_chat.jinja").read_text(encoding="utf-8")


def calibration_text() -> Path:
    """160 passages of 80 books in English, in the public domain: calibration text where nobody names another."""
    return _FOLDER / "calibration.jsonl.xz"
