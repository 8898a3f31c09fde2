"""Models to customize, in fp32: a language model, or its backbone under a new head."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ..checkpoint.hf import check_checkpoint, read_config
from ..files import write_json
from ..registration import register
from ..train.inputs import saved_model

CLASSES: dict[str, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
}
"""Heads by the names of transformers' tasks."""
SUFFIXES = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
"""The end of an architecture's name in `config.json`, and the head that it has."""

TEMPERATURE = "label_temperature"
"""Field of a classifier's `config.json`: what divides its logits before its probabilities are calibrated."""


def language_model(folder: Path, device: Any) -> nn.Module:
    """The language model of a checkpoint folder in fp32."""
    return saved_model(folder, device)


def pad_id(tokenizer: Any) -> int:
    """The id at padding: the tokenizer's own; else that of the end of a text."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    raise ValueError("the tokenizer has no padding token and no end-of-text token, so texts cannot share a batch")


def head_model(
    folder: Path, tokenizer: Any, head: str, config: dict[str, Any], seed: int, device: Any
) -> tuple[nn.Module, int]:
    """A checkpoint's backbone in fp32 under a head, and the id at padding.

    Args:
        folder: of a language model, or of a model with that head, whose weights are then kept if they fit.
        tokenizer: its tokenizer.
        head: key of `CLASSES`.
        config: fields of the configuration, such as `num_labels`.
        seed: determines the weights of a new head.
        device: where the model goes.
    """
    check_checkpoint(folder)
    register()
    pad = pad_id(tokenizer)
    torch.manual_seed(seed)
    model, info = _loaded(folder, head, {**config, "pad_token_id": pad}, ignore_mismatched_sizes=True)
    own = {name.split(".")[0] for name, _ in model.named_parameters()} - {model.base_model_prefix}
    # Without this check a backbone under other names would be trained from random weights.
    missing = next((name for name in sorted(info["missing_keys"]) if name.split(".")[0] not in own), None)
    if missing is not None:
        raise ValueError(f"{folder}: tensor {missing!r} of the backbone is missing from the checkpoint")
    return model.to(device), pad


def saved_head(folder: Path, head: str, dtype: torch.dtype | None, device: Any) -> Any:
    """A model with a trained head, in evaluation mode.

    Raises:
        ValueError: a tensor is missing.
    """
    model, info = _loaded(folder, head, {}, dtype=dtype or "auto")
    if info["missing_keys"]:
        raise ValueError(f"{folder}: tensor {sorted(info['missing_keys'])[0]!r} is missing from the checkpoint")
    return model.to(device).eval()


def head_of(folder: Path) -> str | None:
    """The head that a checkpoint's `config.json` names: a key of `CLASSES`; None for a language model."""
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["none"]
    return next((head for suffix, head in SUFFIXES.items() if str(architectures[0]).endswith(suffix)), None)


def _loaded(folder: Path, head: str, changes: dict[str, Any], **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model under a head, with changes of its configuration, and what transformers says of the loading."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    body = CLASSES[head]._model_mapping[type(config)].base_model_prefix
    if body != "model":  # transformers calls the backbone of question answering `transformer`
        options["key_mapping"] = {r"^model\.": f"{body}."}
    options.setdefault("dtype", torch.float32)
    return CLASSES[head].from_pretrained(folder, config=config, output_loading_info=True, **options)


def store_temperature(folder: Path, temperature: float | None) -> None:
    """Write the temperature that calibrates a classifier's probabilities into its `config.json`; None removes one that
    the model has from the checkpoint that it was trained from."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if temperature is not None or TEMPERATURE in config:
        rest = {name: value for name, value in config.items() if name != TEMPERATURE}
        write_json(folder / "config.json", rest if temperature is None else {**rest, TEMPERATURE: temperature})


def stored_temperature(config: Mapping[str, Any], where: object) -> float:
    """The temperature that training stored in the values of a `config.json`.

    Raises:
        ValueError: it has none, or no positive number; `where` names the file or model.
    """
    found = config.get(TEMPERATURE)
    if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < math.inf:
        raise ValueError(
            f"{where}: {TEMPERATURE} is {found!r}; calibrated probabilities need the positive number that `minitron "
            f"finetune --task classify --labels one` stores when it has validation and test rows"
        )
    return float(found)


def attention_config(attention: str, folder: Path) -> dict[str, Any]:
    """The fields of a configuration for `--attention`.

    Args:
        attention: `causal`; `bidirectional`, all layers read both sides; `bidirectional:N`, the last N layers do.
        folder: of the model.

    Raises:
        ValueError: another text, another number of layers than the model has, or a part of the layers of a model
            whose classes are transformers' own, which know all or none.
    """
    kind, colon, number = attention.partition(":")
    if kind not in ("causal", "bidirectional") or (colon and kind == "causal") or (colon and not number.isdecimal()):
        raise ValueError(f"--attention is {attention!r}; it must be causal, bidirectional or bidirectional:LAYERS")
    if kind == "causal":
        return {}
    config = read_config(folder)
    layers = config.num_hidden_layers
    if not colon or int(number) == layers:
        return {"is_causal": False}
    if not 1 <= int(number) < layers:
        raise ValueError(f"--attention is {attention!r}; the model has {layers} layers")
    if config.model_type != "nemotron":
        raise ValueError(
            f"--attention is {attention!r}; a {config.model_type} model reads both sides in all layers or in none: "
            f"give --attention bidirectional"
        )
    return {"bidirectional_layers": int(number)}
