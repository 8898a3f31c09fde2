"""What a model says about texts: bits per byte, the probability of a label, an embedding; and counts of tokens.

Texts go through the model one at a time on one thread, so that a result does not depend on its neighbours.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .recipe import QualityScore, Semantic
from .texts import Texts

_CHARACTERS_PER_TOKEN = 16
"""More characters of a text are never tokenized than this for each token that is wanted."""


@dataclass(frozen=True)
class Scorer:
    """A score of texts, and the range that stays."""

    name: str
    """Of `distributions.EDGES`: bits per byte or probability."""
    lowest: float | None
    highest: float | None
    run: Callable[[str], float]

    def __call__(self, texts: Texts) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(texts,) float32; NaN for a text of fewer than two tokens, which stays."""
        with _one_thread():
            return np.asarray([self.run(text) for text in texts.to_list()], dtype=np.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def scorer(settings: QualityScore) -> Scorer:
    """The score that a recipe asks for.

    Raises:
        ValueError, FileNotFoundError: the model cannot be used; the message says why.
    """
    if settings.label is None:
        if settings.min_score is None and settings.max_score is None:
            raise ValueError("quality_score: give max_score (or min_score), in bits per byte, or a classifier's label")
        run = functools.partial(bits_per_byte, settings.model, settings.tokens)
        _language_model(settings.model)
        return Scorer("bits per byte", settings.min_score, settings.max_score, run)
    _label_index(settings.model, settings.label)
    run = functools.partial(label_probability, settings.model, settings.label, settings.tokens)
    lowest = 0.5 if settings.min_score is None and settings.max_score is None else settings.min_score
    return Scorer("probability", lowest, settings.max_score, run)


@functools.lru_cache(maxsize=2)
def _language_model(path: str) -> Any:
    from ..loading import load

    return load(path, device="cpu")


@functools.lru_cache(maxsize=2)
def _classifier(path: str) -> Any:
    from ..heads import NemotronForSequenceClassification
    from ..tokenizer import load_tokenizer

    config = Path(path).expanduser() / "config.json"
    try:
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError) as error:
        raise ValueError(f"quality_score.model: {config}: cannot be read ({error})") from None
    if not any(str(name).endswith("ForSequenceClassification") for name in names):
        raise ValueError(f"quality_score.label needs a sequence classifier; {config} has architectures: {names}")
    made: Any = NemotronForSequenceClassification.from_pretrained(config.parent, output_loading_info=True)
    model, info = made
    if info["missing_keys"]:
        raise ValueError(f"{path}: tensor {sorted(info['missing_keys'])[0]!r} is missing from the checkpoint")
    return model.float().eval(), load_tokenizer(config.parent, vocab_size=model.config.vocab_size)


def _label_index(path: str, label: str) -> int:
    model, _ = _classifier(path)
    labels = {str(name): int(index) for index, name in model.config.id2label.items()}
    if label not in labels:
        raise ValueError(f"quality_score.label is {label!r}; {path} has the labels: {', '.join(labels)}")
    return labels[label]


def _ids(tokenizer: Any, text: str, tokens: int) -> tuple[Any, int]:
    """((1, tokens) ids, bytes of the text that all but the first of them stand for)."""
    import torch

    found = tokenizer(
        text[: tokens * _CHARACTERS_PER_TOKEN], truncation=True, max_length=tokens, add_special_tokens=False,
        return_offsets_mapping=True,
    )  # fmt: skip
    spans = found["offset_mapping"]
    size = len(text[spans[0][1] : spans[-1][1]].encode()) if spans else 0
    return torch.tensor([found["input_ids"]]), size


def bits_per_byte(path: str, tokens: int, text: str) -> float:
    """Bits per byte of the beginning of a text under a language model, from its second token on."""
    from torch.nn.functional import cross_entropy

    model, tokenizer = _language_model(path)
    ids, size = _ids(tokenizer, text, min(tokens, model.config.max_position_embeddings))
    if ids.shape[1] < 2 or not size:
        return math.nan
    logits = model(input_ids=ids).logits[0, :-1].float()
    return float(cross_entropy(logits, ids[0, 1:], reduction="sum")) / math.log(2) / size


def label_probability(path: str, label: str, tokens: int, text: str) -> float:
    """Probability of a classifier's label for the beginning of a text."""
    model, tokenizer = _classifier(path)
    ids, _ = _ids(tokenizer, text, min(tokens, model.config.max_position_embeddings))
    if not ids.shape[1]:
        return math.nan
    return float(model(input_ids=ids).logits[0].float().softmax(-1)[_label_index(path, label)])


def embeddings(texts: Texts, settings: Semantic) -> np.ndarray[Any, np.dtype[np.float16]]:
    """(texts, hidden size) float16 of length 1: the mean of a language model's last hidden states of each text."""
    model, tokenizer = _language_model(settings.model)
    out = np.zeros((len(texts), model.config.hidden_size), dtype=np.float16)
    limit = min(settings.tokens, model.config.max_position_embeddings)
    with _one_thread():
        for row, text in zip(out, texts.to_list(), strict=True):
            ids, _ = _ids(tokenizer, text, limit)
            if ids.shape[1]:
                mean = model.model(input_ids=ids).last_hidden_state[0].float().mean(0).numpy()
                row[:] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return out


def token_counter(name: str) -> Callable[[Texts], np.ndarray[Any, np.dtype[np.int64]]]:
    """A function that counts the tokens of texts, without special tokens.

    Raises:
        ValueError, FileNotFoundError: see `tokenizer.load_tokenizer`.
    """
    tokenizer = _tokenizer(name)
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def count(texts: Texts) -> np.ndarray[Any, np.dtype[np.int64]]:
        found = texts.to_list()
        if backend is not None:
            encoded = backend.encode_batch_fast(found, add_special_tokens=False)
            return np.asarray([len(each) for each in encoded], dtype=np.int64)
        ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in found)
        return np.asarray([len(each) for each in ids], dtype=np.int64)

    return count


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str) -> Any:
    import os

    from ..loading import checkpoint_folder
    from ..tokenizer import load_tokenizer

    # Each worker has a core of its own; threads of the tokenizer would only compete.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = Path(name).expanduser()
    return load_tokenizer(folder if folder.is_dir() else checkpoint_folder(name), template=False)
