"""Files that come with the package: models with their tokenizer, a chat template, texts to calibrate and test on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

_FOLDER = Path(__file__).parent

BUNDLED: dict[str, Literal["default", "half"]] = {"bundled": "default", "bundled-half": "half"}
"""Names that are taken where a checkpoint is asked for, and the bundled models that they mean."""


def bundled_model(name: Literal["default", "half"] = "default") -> Path:
    """Folder of a model that comes with the package, in the Hugging Face layout; its README.md tells how it was made.

    Args:
        name: "default", or "half": its child of half the parameters without embeddings, made by `minitron compress`.

    Raises:
        FileNotFoundError: the package was installed without it.
        ValueError: no such name.
    """
    if name not in BUNDLED.values():
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(BUNDLED.values())}")
    folder = _FOLDER / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: the bundled model is missing; install minitron again, or name a checkpoint")
    return folder


def default_draft(model: str | Path) -> Path | None:
    """The smaller model that drafts for `model` where nobody names another: the bundled model's child, or None."""
    return bundled_model("half") if Path(model) == _FOLDER / "default" else None


def stated_losses(folder: Path) -> dict[str, float]:
    """Held-out losses in nats per token, by the text's name, as the card of a bundled model states them."""
    from huggingface_hub import ModelCard

    results: list[Any] = ModelCard.load(folder / "README.md").data.to_dict()["model-index"][0]["results"]
    return {
        result["dataset"]["name"]: metric["value"]
        for result in results
        for metric in result["metrics"]
        if metric["type"] == "nats_per_token"
    }


def chat_template() -> str:
    """The Jinja template of the Nemotron-Mini prompt format, with tools, tool calls and tool results."""
    return (_FOLDER / "nemotron_chat.jinja").read_text(encoding="utf-8")


def calibration_text() -> Path:
    """160 passages of 80 books in English, in the public domain: calibration text where nobody names another."""
    return _FOLDER / "calibration.jsonl.xz"


def recipes() -> dict[str, Path]:
    """The recipes of `minitron compress` that come with the package, by name."""
    return {path.stem: path for path in sorted((_FOLDER / "recipes").glob("*.yaml"))}


def heldout_text() -> Path:
    """38 passages of 19 books in English, in the public domain, that the bundled models were not trained on."""
    return _FOLDER / "heldout.jsonl.xz"
