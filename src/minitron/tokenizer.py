"""Loading the tokenizer of a checkpoint, and checking that it belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .assets import chat_template
from .chat import SYSTEM_MARK, TURN_MARK

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_tokenizer(
    path: str | Path, vocab_size: int | None = None, template: bool = True, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or repository, whatever Hugging Face tokenizer it is.

    Args:
        path: folder, or repository id.
        vocab_size: rows of the model's embedding; a tokenizer with more ids is refused.
        template: give the Nemotron-Mini chat template to a tokenizer that has its marks but no template.
        **kwargs: passed to `AutoTokenizer.from_pretrained`.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
        ValueError: the tokenizer cannot be read, or does not fit the vocabulary.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _FILES):
        raise FileNotFoundError(f"{folder}: no tokenizer; expected one of {', '.join(_FILES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), **kwargs)
    except Exception as error:  # the readers raise anything, a plain Exception too, and name no file
        raise ValueError(f"{path}: the tokenizer cannot be read: {error}") from error
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=-1)
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {highest}; the model's vocab_size is {vocab_size}, "
            f"so ids must be below that"
        )
    if template and tokenizer.chat_template is None and SYSTEM_MARK in vocabulary and TURN_MARK in vocabulary:
        tokenizer.chat_template = chat_template()
    return tokenizer
