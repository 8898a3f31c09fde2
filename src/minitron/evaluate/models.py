"""Check that models can be loaded, before data are downloaded and before hours of work."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..checkpoint.hf import check_checkpoint, read_config
from ..config import ModelConfig
from ..loading import checkpoint_folder
from ..locate import fetch, locate
from ..tokenizer import load_tokenizer


class Description(NamedTuple):
    """What is known about a model without its weights."""

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase


def describe(model: str | Path | None) -> Description:
    """Configuration and tokenizer of a model, found as `load` finds it.

    The files of a local checkpoint and the shapes in them are checked too; from a repository only the configuration and
    the tokenizer are fetched.

    Raises:
        FileNotFoundError, ValueError: as of `load`.
    """
    found = locate(model)
    if isinstance(found, Path):
        folder = checkpoint_folder(model)
        check_checkpoint(folder)
        source: str | Path = folder
    else:
        folder, source = fetch(found, config_only=True), found
    config = read_config(folder)
    return Description(config, load_tokenizer(source, vocab_size=config.vocab_size))
